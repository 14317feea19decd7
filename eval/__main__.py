"""Score sets of images: ``python -m eval score GENERATED REFERENCE --detector lite0-320@64 --metrics fd,kid,prdc``.

Numbers go to stdout as a table, progress and warnings to stderr, everything a number depends on to --json and --csv.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from dmd2.errors import UserError, readable_errors
from dmd2.files import write_json, write_text
from eval.detectors import WEIGHTS, load_detector
from eval.features import FeatureSet
from eval.measure import METRICS, PAIRED, compare, known, measure, provenance, verdict
from eval.reference import FEATURES, Engine, holds_moments, part_of, save_moments
from eval.resize import Geometry

app = typer.Typer(help=__doc__, no_args_is_help=True)

Images = Annotated[Path, typer.Argument(help="folder or zip of images, npz, npy, safetensors, or manifest.json")]
ReferencePath = Annotated[Path, typer.Argument(help="images, an npz of EDM or clean-fid, or a manifest of moments")]
DetectorName = Annotated[str, typer.Option("--detector", help="network of the features, for example lite0-320@64")]
Metrics = Annotated[str, typer.Option(help=f"some of {','.join(METRICS)}")]
GeometryName = Annotated[str, typer.Option(help="none, square-crop+lanczos-S or patch-299, on both sides")]
Count = Annotated[int | None, typer.Option(help="number of generated images the protocol asks for, exactly")]
First = Annotated[int | None, typer.Option(min=1, help="use the first this many generated images only")]
Classes = Annotated[int | None, typer.Option(min=1, help="image i was drawn for class i mod this")]
Duplicates = Annotated[bool, typer.Option("--allow-duplicates", help="repeated generated images are meant")]
Json = Annotated[Path | None, typer.Option("--json", help="write numbers and provenance here")]
Csv = Annotated[Path | None, typer.Option("--csv", help="write one line per number here")]
Cache = Annotated[Path, typer.Option(help="folder of feature shards")]
Batch = Annotated[int, typer.Option(min=1, help="images per call of the network")]
Workers = Annotated[int, typer.Option(min=0, help="processes that decode images; 0 decodes in this one")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to PyTorch")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Weights = Annotated[Path, typer.Option(help="folder of network weights")]
Shard = Annotated[str | None, typer.Option(help="i/k: only compute part i of k of the features, i from 0")]


@app.command()
def score(
    generated: Images, reference: ReferencePath, detector: DetectorName, metrics: Metrics = "fd",
    geometry: GeometryName = "none", images: Count = None, first: First = None, classes: Classes = None,
    allow_duplicates: Duplicates = False, json: Json = None, csv: Csv = None, shard: Shard = None,
    cache: Cache = FEATURES, batch: Batch = 64, workers: Workers = 0, threads: Threads = 0, device: Device = "cpu",
    weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Measure GENERATED against REFERENCE: every value with its standard error, 95 % interval and bias."""
    with readable_errors():
        names = known(metrics.split(","), METRICS)
        engine = _engine(detector, geometry, cache, batch, workers, threads, device, weights)
        source = engine.open(generated, images, first)
        if shard:
            sides = [source] if holds_moments(reference) else [source, engine.open(reference)]
            done = [engine.fill(side, *part_of(shard)) for side in sides]
            print(f"shard {shard}: features of {sum(done)} of {sum(map(len, sides))} images are in {cache}")
            return
        seconds: dict[str, float] = {}
        with _timed(seconds, "reference"):
            ref = engine.reference(reference)
        with _timed(seconds, "features"):
            sample = engine.features(source)
        _refuse_duplicates(sample, generated, allow_duplicates)
        with _timed(seconds, "metrics"):
            found = measure(sample, ref, names, classes)
        rows = [{"arm": str(generated), "metric": name, **value.as_json()} for name, value in found.items()]
        arms = {"generated": {"path": str(generated), **sample.source}}
        _report({"kind": "score", **arms, **provenance(sample, ref, classes, seconds), "rows": rows}, json, csv)


@app.command("paired")
def paired_(
    a: Images, b: Images, reference: ReferencePath, detector: DetectorName, metrics: Metrics = "fd",
    margin: Annotated[float | None, typer.Option(min=0, help="differences below this count as equivalent")] = None,
    geometry: GeometryName = "none", images: Count = None, first: First = None, classes: Classes = None,
    allow_duplicates: Duplicates = False, json: Json = None, csv: Csv = None, cache: Cache = FEATURES,
    batch: Batch = 64, workers: Workers = 0, threads: Threads = 0, device: Device = "cpu", weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Measure B minus A, two sets whose images at one index share seed and label or prompt, against REFERENCE."""
    with readable_errors():
        names = known(metrics.split(","), PAIRED)
        engine = _engine(detector, geometry, cache, batch, workers, threads, device, weights)
        seconds: dict[str, float] = {}
        with _timed(seconds, "reference"):
            ref = engine.reference(reference)
        with _timed(seconds, "features"):
            sets = [engine.features(engine.open(path, images, first)) for path in (a, b)]
        for sample, path in zip(sets, (a, b), strict=True):
            _refuse_duplicates(sample, path, allow_duplicates)
        with _timed(seconds, "metrics"):
            values = [measure(sample, ref, names, classes) for sample in sets]
            differences = compare(sets[0], sets[1], ref, names, classes)
        rows = []
        for name, difference in differences.items():
            rows += [
                {"arm": str(path), "metric": name, **value[name].as_json(), "verdict": None}
                for path, value in zip((a, b), values, strict=True)
            ]
            conclusion = verdict(difference, margin)
            rows.append({"arm": "b - a", "metric": name, **difference.as_json(), "verdict": conclusion})
        arms = {name: {"path": str(p), **s.source} for name, p, s in zip("ab", (a, b), sets, strict=True)}
        about = provenance(sets[0], ref, classes, seconds)
        _report({"kind": "paired", **arms, "margin": margin, **about, "rows": rows}, json, csv)


@app.command()
def stats(
    images: Images, out: Annotated[Path, typer.Argument(help="manifest to write, NAME/manifest.json")],
    detector: DetectorName, geometry: GeometryName = "none", shard: Shard = None, cache: Cache = FEATURES,
    batch: Batch = 64, workers: Workers = 0, threads: Threads = 0, device: Device = "cpu", weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Write the moments of IMAGES to OUT, to serve as a REFERENCE that is computed once."""
    with readable_errors():
        engine = _engine(detector, geometry, cache, batch, workers, threads, device, weights)
        source = engine.open(images)
        if shard:
            done = engine.fill(source, *part_of(shard))
            print(f"shard {shard}: features of {done} of {len(source)} images are in {cache}")
            return
        saved = save_moments(engine, source, images, out)
        print(f"{out}: moments of {saved.count} images, {len(saved.mean)} dimensions, by {engine.detector.name}")


def _engine(
    detector: str, geometry: str, cache: Path, batch: int, workers: int, threads: int, device: str, weights: Path
) -> Engine:
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {device} here: use --device cpu")
    return Engine(load_detector(detector, weights, device), Geometry(geometry), cache, batch, workers)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _refuse_duplicates(sample: FeatureSet, path: Path, allowed: bool) -> None:
    if sample.duplicates and not allowed:
        raise UserError(
            f"{path}: {sample.duplicates} of {len(sample)} images repeat an earlier one: fewer samples than files; "
            "give --allow-duplicates if the generator really repeats itself"
        )


def _report(document: dict[str, Any], json: Path | None, csv: Path | None) -> None:
    """Warnings to stderr, the table to stdout, everything to the files asked for."""
    for warning in document["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    rows = pd.DataFrame(document["rows"])
    detector, reference = document["detector"], document["reference"]
    if json:
        write_json(json, document)
    if csv:
        about = {
            "detector": detector["name"], "weights": detector.get("weights"), "reference": reference["id"],
            "geometry": document["geometry"], "labels": document["labels"], "samples": document["samples"],
            "seconds": sum(document["seconds"].values()), **document["versions"],
        }  # fmt: skip
        write_text(csv, rows.assign(**about).to_csv(index=False))
    print(f"{detector['name']}, geometry {document['geometry']}, n = {document['n']}, reference {reference['path']}")
    shown = rows.astype(object).where(rows.notna(), "-").map(lambda x: f"{x:.6g}" if isinstance(x, float) else x)
    print(shown.to_string(index=False))


if __name__ == "__main__":
    app()
