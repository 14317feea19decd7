"""``python -m dmd2.training``: the jobs that make teachers and noise-image pairs; each writes OUT, a manifest.

(Students are trained by ``dmd2 run``.)
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import readable_errors
from dmd2.core.options import Device
from dmd2.core.provenance import recorded
from dmd2.experiment.config import Data, Teacher
from dmd2.experiment.run_inputs import pair_inputs

app = typer.Typer(help=__doc__)


@app.command()
def teacher(
    data: Annotated[str, typer.Option(help="JSON of the data section")],
    teacher: Annotated[str, typer.Option(help="JSON of the teacher section")],
    out: Path,
    real: Annotated[Path | None, typer.Option(help="manifest of the real data, to train a teacher")] = None,
    threads: int = 1,
    device: Device = "auto",
    deterministic: Annotated[bool, typer.Option(help="as training.deterministic of the cluster file")] = False,
) -> None:
    """Train or adopt a teacher: write OUT and the network beside it."""
    with readable_errors():
        spec, of = Teacher.model_validate(json.loads(teacher)), Data.model_validate(json.loads(data))
        import torch

        from dmd2.core.distributed import local_device
        from dmd2.core.precision import deterministic_kernels, float32_products
        from dmd2.networks.light_diffusers import light_diffusers

        light_diffusers(of)
        from dmd2.training.make_teacher import adopt_teacher, train_teacher

        torch.set_num_threads(threads)
        settings, inputs = [json.loads(data), json.loads(teacher)], [real] if real else []
        with recorded(out, settings, inputs, sources=[spec.source]):
            if spec.train is None or real is None:
                adopt_teacher(spec, out.parent, of)
            else:
                place = local_device(device, "teacher")
                with deterministic_kernels(deterministic), float32_products(spec.train.precision):
                    train_teacher(of, spec, real, out.parent, place)


@app.command("pairs")
def pairs_shard(
    config: Annotated[str, typer.Option(help="JSON of data, teacher and regression.pairs")],
    teacher: Path,
    index: int,
    out: Path,
    threads: int = 1,
    device: Device = "auto",
) -> None:
    """Make one shard of pairs by the teacher of a manifest."""
    with readable_errors():
        import torch

        from dmd2.core.distributed import local_device
        from dmd2.networks.light_diffusers import light_diffusers

        light_diffusers(Data.model_validate(json.loads(config)["data"]))
        from dmd2.training.pairs import PairsConfig, make_shard

        torch.set_num_threads(threads)
        cfg = PairsConfig.model_validate(json.loads(config))
        with recorded(out, json.loads(config), [teacher, *pair_inputs(cfg.data)]):
            make_shard(cfg, teacher, index, out, local_device(device, "pairs"))


@app.command("join")
def join_pairs(out: Path, shards: list[Path]) -> None:
    """Write the manifest OUT of finished SHARDS of pairs."""
    from dmd2.training.pairs import join_shards

    with readable_errors():
        with recorded(out, None, shards):
            join_shards(shards, out)


if __name__ == "__main__":
    app()
