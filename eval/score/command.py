"""Score sets of images: ``dmd2 eval score GENERATED REFERENCE --detector lite0-320@64 --metrics fd,kid,prdc``.

Numbers go to stdout as a table, progress and warnings to stderr, everything a number depends on to --json and --csv.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.experiment.metrics import options as metric_options
from dmd2.experiment.protocols import known_protocols
from eval.score.options import Options

if TYPE_CHECKING:
    from eval.score.call import Call

SCORED, PAIRED = metric_options(), metric_options(paired=True)
# Lowest number and help of the options that several commands share; their types and defaults are those of `Options`.
OPTIONS: dict[str, tuple[int | None, str]] = {
    "protocol": (None, "sets what other options leave out; see dmd2 eval protocols"),
    "detector": (None, "network of the features, e.g. lite0-320@64"),
    "geometry": (None, "none, square-crop+lanczos-S or patch-S, on both sides; clip-score keeps its own"),
    "images": (None, "number of generated images the protocol asks for, exactly"),
    "first": (1, "use the first this many generated images only"),
    "classes": (1, "image i was drawn for class i mod this"),
    "prompts": (None, "one caption per image: lines of a text, or column caption of csv, jsonl, parquet (clip-score)"),
    "clip": (None, "folder of an open_clip model; by default clip-ViT-g-14 in --weights"),
    "per_prompt": (2, "images i K to i K + K - 1 belong to one prompt (lpips-diversity)"),
    "reference_sampled": (None, "the reference is a sample, too: count its error in FD's"),
    "allow_duplicates": (None, "repeated generated images are meant"),
    "json": (None, "write numbers and provenance here"),
    "csv": (None, "write one line per number here"),
    "shard": (None, "i/k: only compute part i of k of the features, i from 0"),
    "cache": (
        None,
        "folder of feature shards; by default data/features of the workspace, else in ~/.cache/dmd2",
    ),
    "batch": (1, "images per call of the network; by default 64, on a GPU 128"),
    "workers": (0, "threads that decode images ahead; by default none, for a GPU one for each core but one"),
    "threads": (0, "CPU threads; 0 leaves the choice to PyTorch"),
    "device": (None, "cpu, cuda, cuda:1, or auto: cuda where there is a GPU"),
    "weights": (None, "folder of network weights; by default data/weights, in the same places"),
}
TYPES = get_type_hints(Options) | {"protocol": str | None, "cache": Path | None, "weights": Path | None}
DEFAULTS = {field.name: None if field.default is MISSING else field.default for field in fields(Options)}
NETWORKS = ("protocol", "detector", "geometry")
MACHINE = ("cache", "batch", "workers", "threads", "device", "weights")
SETS = ("images", "first", "classes", "prompts", "clip", "per_prompt", "allow_duplicates", "json", "csv")

app = typer.Typer(help=__doc__, no_args_is_help=True)


def takes(*shared: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes these of `OPTIONS` besides its own, by keyword."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        for name in shared:
            lowest, told = OPTIONS[name]
            flag = typer.Option(f"--{name.replace('_', '-')}", help=told, min=lowest)
            kind = function.__annotations__[name] = Annotated[TYPES[name], flag]
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=kind))
        function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return app.command(function.__name__)(function)

    return register


Images = Annotated[Path, typer.Argument(help="folder or zip of images, npz, npy, safetensors, or manifest.json")]
Reference = Annotated[
    Path | None,
    typer.Argument(help="images, an npz of EDM or clean-fid, or a manifest of moments, if a metric compares with one"),
]


def _metrics(known: Sequence[str]) -> Any:
    return typer.Option(help=f"some of {','.join(known)}; by default the protocol's, or fd")


@takes(*NETWORKS, *SETS, "reference_sampled", "shard", *MACHINE)
def score(
    generated: Images,
    reference: Reference = None,
    metrics: Annotated[str | None, _metrics(SCORED)] = None,
    **options: Any,
) -> None:
    """Measure GENERATED, against REFERENCE where a metric compares: values, standard errors, 95 % intervals, bias."""
    with readable_errors():
        call = _call(SCORED, metrics, reference=reference, **options)
        from eval.score.record import publish

        if shard := call.options.shard:
            done, total = call.fill(generated, shard)
            print(f"shard {shard}: features of {done} of {total} images are in {call.options.cache}")
            return
        publish({"kind": "score", **_measured(call, {"generated": generated})}, call.options)


@takes(*NETWORKS, *SETS, *MACHINE)
def paired(
    a: Images,
    b: Images,
    reference: Reference = None,
    metrics: Annotated[str | None, _metrics(PAIRED)] = None,
    margin: Annotated[float | None, typer.Option(min=0, help="differences below this count as equivalent")] = None,
    **options: Any,
) -> None:
    """Measure B minus A, two sets whose images at one index share seed and label or prompt."""
    with readable_errors():
        call = _call(PAIRED, metrics, reference=reference, **options)
        from eval.score.record import publish

        publish({"kind": "paired", "margin": margin, **_measured(call, {"a": a, "b": b}, margin)}, call.options)


@takes(*NETWORKS, "shard", *MACHINE)
def stats(
    images: Images,
    out: Annotated[Path, typer.Argument(help="manifest to write, NAME/manifest.json")],
    **options: Any,
) -> None:
    """Write the moments of IMAGES to OUT, to serve as a REFERENCE that is computed once."""
    with readable_errors():
        call = _call(SCORED, None, moments=True, **options)
        from eval.pixels.images import open_images
        from eval.score.call import share_of

        source = open_images(images, call.engine.geometry)
        if shard := call.options.shard:
            done = call.engine.fill(source, *share_of(shard))
            print(f"shard {shard}: features of {done} of {len(source)} images are in {call.options.cache}")
            return
        saved = call.engine.save_moments(source, images, out)
        print(f"{out}: moments of {saved.count} images, {len(saved.mean)} dimensions, by {call.engine.detector.name}")


@app.command()
def protocols() -> None:
    """List the protocols that --protocol knows."""
    import pandas as pd

    rows = []
    for protocol in known_protocols().values():
        labels = f"{protocol.labels} of {protocol.classes}" if protocol.labels else "prompts"
        quirk = f"ones x {protocol.ranks}" if protocol.ranks else "right"
        shown = {key: getattr(protocol, key) for key in ("detector", "geometry", "images")}
        measured = {"rounding": protocol.rounding, "metrics": ",".join(protocol.metrics), "covariance": quirk}
        rows.append({"protocol": protocol.name, **shown, "labels": labels, **measured, "reference": protocol.reference})
    print(pd.DataFrame(rows).to_string(index=False))


def _call(
    known: Sequence[str], metrics: str | None, protocol: str | None, moments: bool = False, **options: Any
) -> "Call":
    asked = Options.of(known, protocol, metrics, **options)
    if not moments:  # which need no reference
        asked.check()
    import torch  # for seconds, in which a mistake is not told

    from eval.score.call import Call

    if threads := options["threads"]:
        torch.set_num_threads(threads)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if asked.device == "auto" else asked.device
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no device {place} here: use --device cpu")
    return Call(replace(asked, device=place))


def _measured(call: "Call", sets: dict[str, Path], margin: float | None = None) -> dict[str, Any]:
    """Rows of one set, or of two and of their difference, and everything these depend on."""
    from eval.score.call import differences
    from eval.score.record import provenance, verdict

    seconds: dict[str, float] = {}
    opened = [(path, call.open(path)) for path in sets.values()]  # what is wrong with one is said before any feature
    with _timed(seconds, "reference"):
        reference = call.reference()
    with _timed(seconds, "features"):
        arms = [call.arm(path, sources) for path, sources in opened]
    for arm in arms if not call.options.allow_duplicates else []:
        arm.refuse_duplicates()
    with _timed(seconds, "metrics"):
        results = [call.results(arm, reference) for arm in arms]
        compared = differences(arms, results) if len(arms) == 2 else {}
    rows: list[dict[str, Any]] = []
    for name in results[0]:
        verdicts = {"verdict": None} if compared else {}
        for arm, found in zip(arms, results, strict=True):
            rows.append({"arm": str(arm.path), "metric": name, **found[name].as_json(), **verdicts})
        if compared:
            told = verdict(compared[name], margin)
            rows.append({"arm": "b - a", "metric": name, **compared[name].as_json(), "verdict": told})
    named_sets = {name: {"path": str(arm.path), **arm.source} for name, arm in zip(sets, arms, strict=True)}
    return {**named_sets, **provenance(arms[0], reference, call.options, seconds), **call.about(), "rows": rows}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
