"""Whether a run's evaluation fits its data: metrics, detector, reference, prompts; imports no torch."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

import yaml

from dmd2.core.errors import did_you_mean
from dmd2.experiment.checks.transformers import Problem
from dmd2.experiment.config import RunConfig
from dmd2.experiment.data_config import Data
from dmd2.experiment.metrics import METRICS, OF_RUNS
from dmd2.experiment.run_inputs import WEIGHTS

LITE0 = ("lite0-320@32", "lite0-320@64", "lite0-1280@64", "lite0-112@64")  # weights in a package, not of these names


@cache
def networks() -> dict[str, bool]:
    """Detectors with published weights, and whether a distance of their features is an FID."""
    listed = yaml.safe_load((files("eval.detectors") / "weights.yaml").read_text(encoding="utf-8"))
    named = {d: entry.get("fid", False) for name, entry in listed.items() for d in (name, *entry.get("detectors", ()))}
    no_features = ("efficientnet", "lpips")
    return dict.fromkeys(LITE0, False) | {name: fid for name, fid in named.items() if not name.startswith(no_features)}


def image_shape(data: Data) -> tuple[int, int | None]:
    """Channels and side of the images behind a set's tensors; None where only a pipeline that is brought knows it."""
    if not data.latents:
        return data.channels, data.resolution
    assert data.text is not None
    made = data.text.pipeline.autoencoder
    levels = None if made is None else made.network.get("block_out_channels", [64])
    return 3, None if levels is None else data.resolution * 2 ** (len(levels) - 1)


def evaluation_problems(cfg: RunConfig, sets: Mapping[str, Data]) -> Iterator[Problem]:
    """What is wrong with the eval section of a run, given every data section by name."""
    spec = cfg.eval
    yield from metric_problems(cfg, networks().get(spec.detector, False))
    for metric in (METRICS[name] for name in spec.metrics if name in METRICS):
        if "labels" in metric.needs and not spec.detector.endswith("-classifier") and cfg.data.labelled:
            told = f"needs labels and a classifier of the set (eval.detector: {cfg.data.name}-classifier)"
            yield "eval.metrics", "eval.detector", f"{metric.name} {told}"
        if "reference images" in metric.needs and spec.reference not in sets:
            told = f"compares with the images of the reference, and {spec.reference} is no set of a base"
            yield "eval.metrics", "eval.reference", f"{metric.name} {told}"
    yield from _model(spec.detector, "eval.detector", cfg, sets)
    if spec.clip is not None:
        yield from _model(spec.clip, "eval.clip", cfg, sets)
    yield from _reference(spec.reference, spec.geometry, "eval", cfg, sets)
    if spec.patch is not None:
        yield from _reference(spec.patch.reference, spec.patch.geometry, "eval.patch", cfg, sets)
    for key in ("prompts", "clip"):
        if cfg.data.text is None and getattr(spec, key) is not None:
            yield f"eval.{key}", "data.text", f"captions belong to data.text, and {cfg.data.name} has none"
    if spec.labels == "none" and cfg.data.labelled:
        yield "eval.labels", "data.classes", f"none, but {cfg.data.name} has {cfg.data.classes} classes: write cyclic"
    if spec.shards > spec.images:
        yield "eval.shards", "eval.images", f"{spec.shards} jobs cannot share eval.images {spec.images}: use fewer"


def metric_problems(cfg: RunConfig, fid: bool) -> Iterator[Problem]:
    """What is wrong with eval.metrics, whatever sets there are; `fid`: distances by the detector are FIDs."""
    spec, key = cfg.eval, "eval.metrics"
    for name in spec.metrics:
        if name not in OF_RUNS:
            yield key, f"there is no metric {name}{did_you_mean(name, OF_RUNS, ': choose from ' + ', '.join(OF_RUNS))}"
            continue
        metric = METRICS[name]
        if metric.function == "frechet" and name.endswith("fid") != fid:
            right = name.removesuffix("fid").removesuffix("fd") + ("fid" if fid else "fd")
            why = "" if fid else ": only the canonical Inception features give an FID"
            yield key, "eval.detector", f"{name} with detector {spec.detector} is called {right}{why}"
        if "patch" in metric.needs and spec.patch is None:
            yield key, "eval.patch", f"{name} needs eval.patch: its geometry and its reference"
        if "captions" in metric.needs and (spec.clip is None or cfg.data.text is None):
            yield key, "eval.clip", f"{name} needs captions (data.text) and a model that reads them (eval.clip)"
        if "labels" in metric.needs and not cfg.data.labelled:
            told = "captions" if cfg.data.text else "none (data.classes 0)"
            yield key, "eval.detector", f"{name} needs labels, and data {cfg.data.name} has {told}"


def set_of(model: str) -> str | None:
    """The set that a model in data/weights is trained on here, as its name says."""
    found = re.fullmatch(r"(.+)-(classifier|clip)", model)
    return found[1] if found else None


def _model(name: str, key: str, cfg: RunConfig, sets: Mapping[str, Data]) -> Iterator[Problem]:
    """Networks resize images themselves; a model trained here on a set takes images as that set has them."""
    own = set_of(name)
    if own is None or own not in sets:
        brought = name.startswith("clip-") or (WEIGHTS / name / "manifest.json").exists()
        if name not in networks() and not brought:
            choices = [*networks(), *(model for data in sets.values() for model in _own_models(data))]
            yield key, f"there is no {name}{did_you_mean(name, choices, ': ' + ', '.join(choices))}"
        return
    data = sets[own]
    if name.endswith("-classifier") and not data.labelled:
        told = f"{own} has no labels, so there is no classifier of it: use a network, such as {LITE0[1]}"
        yield key, "data.classes", told
    if name.endswith("-clip") and (data.text is None or (data.latents and not data.text.keep_images)):
        yield key, f"a CLIP needs captions and images, and {own} has none or keeps none (data.text.keep_images)"
    (channels, side), (own_channels, own_side) = image_shape(cfg.data), image_shape(data)
    if side != own_side or channels not in (own_channels, 1) or data.classes != cfg.data.classes:
        told = f"{name} takes images of {own} ({_spoken(data)}), and those of {cfg.data.name} are others"
        advice = f"use {' or '.join([*_own_models(cfg.data), 'a network with published weights'])}"
        yield key, "data.name", f"{told} ({_spoken(cfg.data)}): {advice}"


def _own_models(data: Data) -> list[str]:
    """The model that measures a set and is trained on it, if it has captions or labels."""
    return [f"{data.name}-{'clip' if data.text else 'classifier'}"] if data.text or data.labelled else []


def _spoken(data: Data) -> str:
    channels, side = image_shape(data)
    condition = f"{data.classes} classes" if data.labelled else "captions" if data.text else "no labels"
    return f"{channels}x{side or '?'}x{side or '?'}, {condition}"


def _reference(name: str, geometry: str, section: str, cfg: RunConfig, sets: Mapping[str, Data]) -> Iterator[Problem]:
    """A set must have images as the run makes them, unless the geometry brings both to one size."""
    key, (channels, side) = f"{section}.reference", image_shape(cfg.data)
    patch = re.search(r"^patch-(\d+)", geometry)
    if patch and side is not None and side < int(patch[1]) and not geometry.endswith("-official"):
        told = f"images of {cfg.data.name} have a side of {side}: there is no {geometry} in them"
        yield f"{section}.geometry", "data.resolution", told
    if not re.fullmatch(r"\w[\w.@-]*", name) or name.endswith((".npz", ".json")):
        told = "name a set of a base, or a file data/refs/NAME.npz by its NAME"
        yield key, f"{name!r} is no name of a reference: {told}"
    if name not in sets:
        return  # the user's moments, of which nothing is known here
    data = sets[name]
    if data.latents and data.text is not None and not data.text.keep_images:
        yield key, f"{name} keeps latents only: set data.text.keep_images in its base"
    own_channels, own_side = image_shape(data)
    sized = geometry.startswith("square-crop") or None in (side, own_side)
    if channels != own_channels or (side != own_side and not sized):
        told = f"images of {name} are {_spoken(data)}, those of {cfg.data.name} {_spoken(cfg.data)}"
        advice = "compare with a set of that shape, or bring both to one size by eval.geometry square-crop+lanczos-SIZE"
        yield key, "data.name", f"{told}: {advice}"
