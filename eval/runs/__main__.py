"""``python -m eval.runs``: measure a student's snapshots, or the teacher's samplers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import readable_errors
from dmd2.core.options import Device
from dmd2.core.provenance import recorded, sole_maker
from dmd2.core.run import RunId
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import measured_with

app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the run")]
Part = Annotated[int | None, typer.Option(help="only fill the features that fall to job PART of eval.shards")]


def read(config: str, threads: int) -> RunConfig:
    """The config of a run. Its sections say what has to be imported to measure it."""
    cfg = RunConfig.model_validate(json.loads(config))
    import torch

    from dmd2.networks.light_diffusers import light_diffusers

    torch.set_num_threads(threads)
    light_diffusers(cfg.data)
    return cfg


@app.command()
def run(name: str, out: Path, config: Config, part: Part = None, threads: int = 1, device: Device = "auto") -> None:
    """Evaluate every snapshot of the run NAME (base/run/seedN)."""
    with readable_errors():
        run, cfg = RunId.parse(name), read(config, threads)
        from dmd2.core.distributed import local_device
        from eval.runs.evaluate import evaluate_run, fill, student_of

        place = local_device(device, "evaluate")
        if part is not None:
            with sole_maker(out):
                fill(student_of(run, cfg, place), part, out, {"run": name})
            return
        inputs = [*measured_with(cfg).values(), run.folder / "train.json"]
        with recorded(out, json.loads(config), inputs, beside=[out.with_name("grid.png")]):
            evaluate_run(run, cfg, place, out)


@app.command()
def teacher(
    sampler: str, out: Path, config: Config, part: Part = None, threads: int = 1, device: Device = "auto"
) -> None:
    """Evaluate one of the teacher's samplers."""
    with readable_errors():
        cfg = read(config, threads)
        from dmd2.core.distributed import local_device
        from eval.runs.evaluate import evaluate_teacher, fill, teacher_of

        place, spec = local_device(device, "evaluate"), cfg.eval.teacher_samplers[sampler]
        if part is not None:
            with sole_maker(out):
                fill(teacher_of(cfg, spec, place), part, out, {"sampler": sampler})
            return
        with recorded(out, json.loads(config), measured_with(cfg).values(), beside=[out.with_name("grid.png")]):
            evaluate_teacher(cfg, sampler, spec, place, out)


if __name__ == "__main__":
    app()
