"""Start the training of a run on the hardware the cluster file describes."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel

from dmd2.ablations import Table, load_experiment
from dmd2.config import RunConfig, TrainConfig
from dmd2.errors import UserError, readable_errors
from dmd2.files import write_json
from dmd2.run import RunId
from dmd2.trainer import Hardware, Inputs, Training

app = typer.Typer(help=__doc__, no_args_is_help=True)


def run_config(run: RunId, config: str | None) -> TrainConfig:
    """The config given as JSON, or the one the tables name."""
    if config is not None:
        return TrainConfig.model_validate(json.loads(config))
    runs = load_experiment().runs
    if (run.base, run.name) not in runs:
        known = ", ".join(sorted(name for base, name in runs if base == run.base))
        raise UserError(f"no table has the run {run.base}/{run.name}; runs of {run.base}: {known or 'none'}")
    return runs[run.base, run.name].training()


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="base/name/seedN, for example digits/dmd2/seed0")],
    config: Annotated[str | None, typer.Option(help="JSON of the run; default: what the tables say")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of this process")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    micro_batch: Annotated[int, typer.Option(help="largest batch in memory; 0 for the whole global batch")] = 0,
) -> None:
    """Train a run, or continue it; results/runs/RUN/train.json exists when it is finished."""
    with readable_errors():
        torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # TF32, as in the paper's runs
        run_id = RunId.parse(run)
        cfg = run_config(run_id, config)
        hardware = Hardware(device, threads, micro_batch or cfg.optim.batch)
        Training(run_id, cfg, hardware, Inputs.of(run_id, cfg)).run()


@app.command()
def schema(folder: Annotated[Path, typer.Argument(help="where to write them")] = Path("workflow/schemas")) -> None:
    """Write the JSON Schemas of a base and of a table, for editors."""
    models: dict[str, type[BaseModel]] = {"base": RunConfig, "table": Table}
    for name, model in models.items():
        write_json(folder / f"{name}.schema.json", model.model_json_schema())


if __name__ == "__main__":
    app()
