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

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import write_json, write_text
from dmd2.experiment.metrics import options as metric_options
from dmd2.experiment.protocols import known_protocols
from dmd2.experiment.run_inputs import WEIGHTS
from eval.detectors.reference import FEATURES, part_of, save_moments
from eval.score.call import Call, differences, engine_of
from eval.score.measure import provenance, verdict
from eval.score.options import Asked, Inputs
from eval.score.prompted import Machine

SCORED, PAIRED = metric_options(), metric_options(paired=True)

app = typer.Typer(help=__doc__, no_args_is_help=True)

Images = Annotated[Path, typer.Argument(help="folder or zip of images, npz, npy, safetensors, or manifest.json")]
ReferencePath = Annotated[
    Path | None,
    typer.Argument(help="images, an npz of EDM or clean-fid, or a manifest of moments, if a metric compares with one"),
]
ProtocolName = Annotated[
    str | None, typer.Option("--protocol", help="sets what other options leave out; see python -m eval protocols")
]
DetectorName = Annotated[str | None, typer.Option("--detector", help="network of the features, e.g. lite0-320@64")]
Metrics = Annotated[str | None, typer.Option(help=f"some of {','.join(SCORED)}; by default the protocol's, or fd")]
PairedMetrics = Annotated[
    str | None, typer.Option(help=f"some of {','.join(PAIRED)}; by default the protocol's, or fd")
]
GeometryName = Annotated[
    str | None,
    typer.Option(help="none, square-crop+lanczos-S or patch-S, on both sides; clip-score keeps its own"),
]
Count = Annotated[int | None, typer.Option(help="number of generated images the protocol asks for, exactly")]
First = Annotated[int | None, typer.Option(min=1, help="use the first this many generated images only")]
Classes = Annotated[int | None, typer.Option(min=1, help="image i was drawn for class i mod this")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="one caption per image: lines of a text, or column caption of csv, jsonl, parquet (clip-score)"),
]
Clip = Annotated[Path | None, typer.Option(help="folder of an open_clip model; by default clip-ViT-g-14 in --weights")]
PerPrompt = Annotated[
    int | None, typer.Option(min=2, help="images i K to i K + K - 1 belong to one prompt (lpips-diversity)")
]
Sampled = Annotated[
    bool, typer.Option("--reference-sampled", help="the reference is a sample, too: count its error in FD's")
]
Duplicates = Annotated[bool, typer.Option("--allow-duplicates", help="repeated generated images are meant")]
Json = Annotated[Path | None, typer.Option("--json", help="write numbers and provenance here")]
Csv = Annotated[Path | None, typer.Option("--csv", help="write one line per number here")]
Cache = Annotated[Path, typer.Option(help="folder of feature shards")]
Batch = Annotated[int, typer.Option(min=1, help="images per call of the network")]
Workers = Annotated[int, typer.Option(min=0, help="processes that decode images; 0 decodes in this one")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to PyTorch")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: cuda where there is a GPU")]
Weights = Annotated[Path, typer.Option(help="folder of network weights")]
Shard = Annotated[str | None, typer.Option(help="i/k: only compute part i of k of the features, i from 0")]


@app.command()
def score(
    generated: Images, reference: ReferencePath = None, protocol: ProtocolName = None, detector: DetectorName = None,
    metrics: Metrics = None, geometry: GeometryName = None, images: Count = None, first: First = None,
    classes: Classes = None, prompts: Prompts = None, clip: Clip = None, per_prompt: PerPrompt = None,
    reference_sampled: Sampled = False, allow_duplicates: Duplicates = False, json: Json = None, csv: Csv = None,
    shard: Shard = None, cache: Cache = FEATURES, batch: Batch = 64, workers: Workers = 0, threads: Threads = 0,
    device: Device = "cpu", weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Measure GENERATED, against REFERENCE where a metric compares: values, standard errors, 95 % intervals, bias."""
    with readable_errors():
        options = {"detector": detector, "geometry": geometry}
        asked = Asked.of(SCORED, protocol, metrics, images=images, classes=classes, **options)
        inputs = Inputs(reference, prompts, clip, per_prompt)
        call = Call.of(asked, inputs, _machine(cache, batch, workers, threads, device, weights), first)
        unused = asked.unused(inputs, reference_sampled=reference_sampled, **options)
        if shard:
            done, total = call.fill(generated, shard)
            print(f"shard {shard}: features of {done} of {total} images are in {cache}")
            return
        seconds: dict[str, float] = {}
        with _timed(seconds, "reference"):
            ref = call.reference(reference_sampled)
        with _timed(seconds, "features"):
            (arm,) = call.arms([generated])
        if not allow_duplicates:
            arm.refuse_duplicates()
        with _timed(seconds, "metrics"):
            found = call.results(arm, ref, reference_sampled)
        rows = [{"arm": str(generated), "metric": name, **r.estimate.as_json()} for name, r in found.items()]
        arms = {"generated": {"path": str(generated), **arm.images.source}}
        about = provenance(arm.images, ref, asked.classes, seconds, reference_sampled and "fd" in asked.metrics)
        _report({"kind": "score", **arms, **about, **call.about(), "rows": rows}, unused, json, csv)


@app.command("paired")
def paired_(
    a: Images, b: Images, reference: ReferencePath = None, protocol: ProtocolName = None,
    detector: DetectorName = None, metrics: PairedMetrics = None,
    margin: Annotated[float | None, typer.Option(min=0, help="differences below this count as equivalent")] = None,
    geometry: GeometryName = None, images: Count = None, first: First = None, classes: Classes = None,
    prompts: Prompts = None, clip: Clip = None, per_prompt: PerPrompt = None, allow_duplicates: Duplicates = False,
    json: Json = None, csv: Csv = None, cache: Cache = FEATURES, batch: Batch = 64, workers: Workers = 0,
    threads: Threads = 0, device: Device = "cpu", weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Measure B minus A, two sets whose images at one index share seed and label or prompt."""
    with readable_errors():
        options = {"detector": detector, "geometry": geometry}
        asked = Asked.of(PAIRED, protocol, metrics, images=images, classes=classes, **options)
        inputs = Inputs(reference, prompts, clip, per_prompt)
        call = Call.of(asked, inputs, _machine(cache, batch, workers, threads, device, weights), first)
        unused = asked.unused(inputs, **options)
        seconds: dict[str, float] = {}
        with _timed(seconds, "reference"):
            ref = call.reference()
        with _timed(seconds, "features"):
            sets = call.arms([a, b])
        for arm in sets if not allow_duplicates else []:
            arm.refuse_duplicates()
        with _timed(seconds, "metrics"):
            results = [call.results(arm, ref) for arm in sets]
            values = [{name: result.estimate for name, result in found.items()} for found in results]
            found = differences(sets, results)
        rows = []
        for name, difference in found.items():
            rows += [
                {"arm": str(arm.path), "metric": name, **value[name].as_json(), "verdict": None}
                for arm, value in zip(sets, values, strict=True)
            ]
            conclusion = verdict(difference, margin)
            rows.append({"arm": "b - a", "metric": name, **difference.as_json(), "verdict": conclusion})
        arms = {name: {"path": str(s.path), **s.images.source} for name, s in zip("ab", sets, strict=True)}
        about = provenance(sets[0].images, ref, asked.classes, seconds)
        _report({"kind": "paired", **arms, "margin": margin, **about, **call.about(), "rows": rows}, unused, json, csv)


@app.command()
def stats(
    images: Images, out: Annotated[Path, typer.Argument(help="manifest to write, NAME/manifest.json")],
    protocol: ProtocolName = None, detector: DetectorName = None, geometry: GeometryName = None, shard: Shard = None,
    cache: Cache = FEATURES, batch: Batch = 64, workers: Workers = 0, threads: Threads = 0, device: Device = "cpu",
    weights: Weights = WEIGHTS,
) -> None:  # fmt: skip
    """Write the moments of IMAGES to OUT, to serve as a REFERENCE that is computed once."""
    with readable_errors():
        asked = Asked.of(SCORED, protocol, None, detector=detector, geometry=geometry)
        engine = engine_of(asked, _machine(cache, batch, workers, threads, device, weights))
        source = engine.open(images)
        if shard:
            done = engine.fill(source, *part_of(shard))
            print(f"shard {shard}: features of {done} of {len(source)} images are in {cache}")
            return
        saved = save_moments(engine, source, images, out)
        print(f"{out}: moments of {saved.count} images, {len(saved.mean)} dimensions, by {engine.detector.name}")


@app.command()
def protocols() -> None:
    """List the protocols that --protocol knows."""
    rows = []
    for protocol in known_protocols().values():
        labels = f"{protocol.labels} of {protocol.classes}" if protocol.labels else "prompts"
        quirk = f"ones x {protocol.ranks}" if protocol.ranks else "right"
        rows.append({
            "protocol": protocol.name, "detector": protocol.detector, "geometry": protocol.geometry,
            "images": protocol.images, "labels": labels, "rounding": protocol.rounding,
            "metrics": ",".join(protocol.metrics), "covariance": quirk, "reference": protocol.reference,
        })  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False))


def _machine(cache: Path, batch: int, workers: int, threads: int, device: str, weights: Path) -> Machine:
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {device} here: use --device cpu")
    return Machine(cache, weights, batch, workers, device)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _report(document: dict[str, Any], unused: list[str], json: Path | None, csv: Path | None) -> None:
    """Warnings to stderr, the table to stdout, everything to the files asked for."""
    document["warnings"] = unused + document["warnings"]
    for warning in document["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    rows = pd.DataFrame(document["rows"])
    if json:
        write_json(json, document)
    if csv:
        write_text(csv, rows.assign(**_columns(document)).to_csv(index=False))
    print("\n".join(_header(document)))
    shown = rows.astype(object).where(rows.notna(), "-").map(lambda x: f"{x:.6g}" if isinstance(x, float) else x)
    print(shown.to_string(index=False))


def _columns(document: dict[str, Any]) -> dict[str, Any]:
    """What every line of the CSV says of its number's protocol."""
    detector, reference = document["detector"] or {}, document["reference"] or {}
    clip, diversity = document.get("clip-score", {}), document.get("lpips-diversity", {})
    return {
        "protocol": document.get("protocol", {}).get("title"), "detector": detector.get("name"),
        "weights": detector.get("weights"), "reference": reference.get("id"), "geometry": document["geometry"],
        "labels": document["labels"], "samples": document["samples"], "interval": document["interval"],
        "clip": clip.get("weights"), "prompts": clip.get("prompts_sha256"), "per_prompt": diversity.get("per_prompt"),
        "seconds": sum(document["seconds"].values()), **document["versions"],
    }  # fmt: skip


def _header(document: dict[str, Any]) -> list[str]:
    """The protocol of the numbers, one line for each network."""
    lines, n = [], f"n = {document['n']}"
    if protocol := document.get("protocol"):
        lines += [
            f"protocol {protocol['title']}",
            f"not checked here: labels {protocol['labels'] or 'of prompts'}, images quantised by "
            f"{protocol['rounding']}, reference {protocol['reference_is']}",
        ]
    if detector := document["detector"]:
        reference = f", reference {document['reference']['path']}" if document["reference"] else ""
        lines.append(f"{detector['name']}, geometry {document['geometry']}, {n}{reference}")
    if clip := document.get("clip-score"):
        lines.append(
            f"{clip['protocol']}, {clip['scale']}, geometry {clip['geometry']}, {n}, prompts {clip['prompts']}"
        )
    if diversity := document.get("lpips-diversity"):
        each = f"{diversity['per_prompt']} images of each prompt"
        lines.append(f"{diversity['network']}, geometry {diversity['geometry']}, {n}, {each}")
    return lines
