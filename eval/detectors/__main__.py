"""``python -m eval.detectors``: the jobs that make detectors and reference statistics; each writes OUT, a manifest.

(``dmd2 eval weights`` fetches published weights.)
"""

from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.options import Device
from dmd2.core.provenance import recorded
from dmd2.experiment.run_inputs import FEATURES, WEIGHTS

app = typer.Typer(help=__doc__)


@app.command()
def detector(name: str, out: Path, real: Path | None = None, threads: int = 1, device: Device = "auto") -> None:
    """Train NAME (SET-classifier, SET-clip) on the manifest --real, or verify the network NAME."""
    with readable_errors():
        import torch

        from dmd2.core.distributed import local_device
        from dmd2.core.precision import strict_float32
        from dmd2.data.sets import load_set
        from eval.detectors.detectors import record_network, train_classifier
        from eval.detectors.small_clip import train_clip

        torch.set_num_threads(threads)
        place = local_device(device, "detector")
        with recorded(out, name, [real] if real else []), strict_float32(place):
            if real is None:
                record_network(name, out)
            elif name.endswith("-clip"):
                train_clip(name, load_set(real), out, place)
            else:
                train_classifier(name, load_set(real), out, place)


@app.command()
def reference(
    source: Path,
    out: Path,
    detector: Annotated[str, typer.Option(help="network of the features")],
    geometry: Annotated[str, typer.Option(help="what is done to the images first")] = "none",
    threads: int = 1,
    device: Device = "auto",
) -> None:
    """Write the feature moments of SOURCE (a real set's manifest, or an npz of moments)."""
    with readable_errors():
        if not source.exists():
            raise UserError(f"{source} is missing: put the reference statistics (npz with mu and sigma) there")
        import torch

        from dmd2.core.distributed import local_device
        from eval.detectors.detectors import load_detector
        from eval.detectors.reference import Engine, holds_moments
        from eval.metrics.frechet import save_stats
        from eval.pixels.images import open_images
        from eval.pixels.resize import Geometry

        torch.set_num_threads(threads)
        place = local_device(device, "reference")
        engine = Engine(load_detector(detector, device=place), Geometry(geometry), FEATURES)
        with recorded(out, [detector, geometry], [WEIGHTS / detector / "manifest.json", source]):
            if holds_moments(source):
                about = {"detector": detector, "data": str(source), "images": None, "geometry": geometry}
                save_stats(engine.reference(source).stats, out, about)
            else:
                engine.save_moments(open_images(source, engine.geometry), source, out)


if __name__ == "__main__":
    app()
