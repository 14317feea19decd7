"""``python -m dmd2.data``: the jobs that prepare real data, prompts and the pipelines that encode them.

Each job writes OUT, a manifest, and puts its files beside it. Pipelines run in IEEE float32 on every device.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.options import Device
from dmd2.core.provenance import recorded
from dmd2.experiment.data_config import Data
from dmd2.experiment.run_inputs import pipeline_settings, prompt_settings

if TYPE_CHECKING:
    import torch

app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the data section")]


@app.callback()
def offline() -> None:
    """Jobs download nothing unless the user's environment says 0."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def encoder(threads: int, device: str) -> Iterator["torch.device"]:
    """Where the pipelines of a job run."""
    import torch

    from dmd2.core.distributed import local_device
    from dmd2.core.precision import strict_float32

    torch.set_num_threads(threads)
    place = local_device(device, "encode")
    with strict_float32(place):
        yield place


@app.command()
def real(config: Config, out: Path) -> None:
    """Prepare real data with labels."""
    from dmd2.data.prepare import prepare_labelled

    with readable_errors():
        data = Data.model_validate_json(config)
        with recorded(out, json.loads(config), sources=[data.source.path]):
            prepare_labelled(data, out.parent)


@app.command()
def pipeline(config: Config, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """List the parts of a pipeline, after making those that are made here."""
    from dmd2.data.make_pipeline import make_pipeline

    with readable_errors():
        data = Data.model_validate_json(config)
        trained_on = data.source.path if data.text and data.text.pipeline.autoencoder else None
        with recorded(out, pipeline_settings(data), sources=[trained_on]), encoder(threads, device) as place:
            make_pipeline(data, out.parent, place)


@app.command()
def part(config: Config, pipeline: Path, index: int, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode one part of the real set."""
    from dmd2.data.prepare import encode_part

    with readable_errors():
        data = Data.model_validate_json(config)
        made_from = recorded(out, json.loads(config), [pipeline], sources=[data.source.path])
        with made_from, encoder(threads, device) as place:
            encode_part(data, pipeline, index, out, place)


@app.command()
def join(config: Config, out: Path, parts: list[Path]) -> None:
    """List the shards of finished PARTS."""
    from dmd2.data.prepare import join_parts

    with readable_errors():
        data = Data.model_validate_json(config)
        with recorded(out, json.loads(config), parts, sources=[data.source.path]):
            join_parts(data, parts, out)


@app.command()
def prompts(config: Config, pipeline: Path, source: Path, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode the prompts of a file."""
    from dmd2.data.prepare import encode_prompts

    with readable_errors():
        data = Data.model_validate_json(config)
        if not source.exists():
            raise UserError(f"data {data.name}: {source} is missing: put the prompts there, one a line")
        with recorded(out, prompt_settings(data), [pipeline, source]), encoder(threads, device) as place:
            encode_prompts(data, pipeline, source, out, place)


if __name__ == "__main__":
    app()
