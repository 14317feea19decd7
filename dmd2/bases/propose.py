"""Three bases and a table for what was found: small, one GPU, and as in the paper."""

import json
import re
from math import prod, sqrt
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dmd2.bases.found import Found
from dmd2.core.errors import UserError

PAPER_PIXELS, SDXL = (3, 64, 64), (4, 128, 128)  # shapes for which the paper chose lambda_g
SMALL, LARGE = 16, 64  # sides of images that are resized, for two CPU cores and for GPUs
# Widths of the networks by side: levels down to 8 pixels and below, as the GAN's head can end them in one logit.
SMALL_WIDTHS = {8: (16, 32), 16: (16, 32), 32: (16, 32, 32), 64: (8, 16, 32, 32)}
GPU_WIDTHS = {8: (128, 256), 16: (128, 256), 32: (128, 256, 256), 64: (128, 128, 256, 256)}
# Schedules of the small bases, of images and of images with captions, and the minutes they take on two cores.
IMAGES: dict[str, Any] = {"teacher_steps": 650, "steps": 64, "batch": 16, "lr": "1.0e-3", "pairs": 200, "minutes": 3}
CAPTIONS: dict[str, Any] = {"teacher_steps": 600, "steps": 64, "batch": 16, "lr": "1.0e-3", "minutes": 3}
MEASURED = 256  # images of an evaluation of a small base, at most: more than twice the detector's 112 dimensions
SMALL_DETECTOR, DETECTOR, PAPER_DETECTOR = "lite0-112@64", "lite0-320@64", "lite0-1280@64"
SHOWN = 6  # classes named in a comment
MADE = "By dmd2 new-base"  # what the comments of its files begin with


def propose(name: str, found: Found, schemas: str = "../schemas") -> dict[str, str]:
    """Texts of the files by their path in ``workflow``; editors find the JSON Schemas at `schemas`.

    Raises:
        UserError: the images are of a size that no proposal has and cannot be resized.
    """
    captioned = bool(found.captions)
    kinds = ("small-text", "gpu-text", "paper-text", "table4") if captioned else ("small", "gpu", "paper", "table3")
    files = [f"base/{name}{which}.yaml" for which in ("", "-gpu", "-paper")] + [f"tables/{table_of(name, found)}.yaml"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    values = {kind: _values(name, found, kind) for kind in kinds}
    return {
        file: environment.get_template(f"{kind}.yaml.j2").render(values[kind], schemas=schemas)
        for file, kind in zip(files, kinds, strict=True)
    }


def table_of(name: str, found: Found) -> str:
    """Name of the table that is proposed."""
    return f"{name}-table{4 if found.captions else 3}"


def described(found: Found) -> str:
    """One phrase of what was found, for a comment and the screen."""
    low, high = min(found.sides), max(found.sides)
    size = f"{low}x{low}" if found.square and low == high else f"{low} to {high} pixels at the shorter side"
    size = size if low != high or found.square else f"{low} pixels at the shorter side"
    colours = "grey" if found.channels == 1 else "RGB"
    condition = "with captions" if found.captions else "without labels"
    if found.classes:
        condition = f"of {len(found.classes)} class{'es' if len(found.classes) > 1 else ''}"
    return f"{found.count:,} {colours} images {condition}, {size}, in {found.source.path}"


def minutes(found: Found) -> int:
    """About how long two CPU cores take for the table of the small base."""
    schedule = CAPTIONS if found.captions else IMAGES
    return round(schedule["minutes"] * max(1, (_side(found, SMALL) / SMALL) ** 2))


def too_few(name: str, found: Found) -> str:
    """Which bases get no interval of the Frechet distance for want of images, as a sentence; empty if all do."""
    features = {base: int(detector.split("-")[1].split("@")[0]) for base, detector in _detectors(found).items()}
    few = [f"{name}{base} {2 * width:,}" for base, width in features.items() if found.count < 2 * width]
    told = (
        f"{found.count:,} images are few: a Frechet distance has an interval from twice as many images as features on"
    )
    return f"{told} ({', '.join(few)})" if few else ""


def _detectors(found: Found) -> dict[str, str]:
    """Detectors of the bases by the ending of their name."""
    return {"": SMALL_DETECTOR, "-gpu": DETECTOR, "-paper": DETECTOR if found.captions else PAPER_DETECTOR}


def _side(found: Found, wanted: int) -> int:
    """The resolution of a base: a power of two from 8 to 64; that of the images, where they are not resized.

    Raises:
        UserError: they are not resized and have none.
    """
    sides = sorted(SMALL_WIDTHS)
    if found.fixed:
        if fits := [side for side in sides if side == found.side or (found.source.kind == "idx" and side > found.side)]:
            return fits[0]
        told = f"images of kind {found.source.kind} are used as they are, and {found.side} pixels are none of"
        raise UserError(f"{told} {', '.join(map(str, sides))}: give them as image files, which are resized")
    return max([side for side in sides if side <= min(wanted, max(found.side, sides[0]))])


def _values(name: str, found: Found, kind: str) -> dict[str, Any]:
    side = _side(found, SMALL if "small" in kind else LARGE)
    shape = (3 if found.captions else found.channels, side, side)
    of_paper = SDXL if "text" in kind else PAPER_PIXELS
    exact = found.square and set(found.sides) == {side}
    source = found.source.model_dump(exclude_none=True)
    if not found.fixed and ("text" in kind or not exact):
        source["resize"] = "center-crop"
    small = CAPTIONS if "text" in kind else IMAGES
    largest = {"small": MEASURED, "gpu": 10000, "paper": 50000}[kind.split("-")[0]] if "table" not in kind else 0
    images = largest if kind in ("gpu", "paper") else max(2, min(largest, found.count))
    words = max((len(caption.split()) for caption in found.captions), default=0)
    return {
        **(small if "small" in kind else {"teacher_steps": 60000}),
        "name": name,
        "headline": f"{MADE}: {described(found)}.",
        "minutes": minutes(found),
        "source": _flow(source),
        "resize": "resize" in source,
        "resolution": side,
        "resolution_comment": _comment(found, side, kind),
        "channels": found.channels,
        "classes": len(found.classes),
        "class_names": _names(found.classes),
        "widths": (SMALL_WIDTHS if "small" in kind else GPU_WIDTHS)[side],
        "layers": 1 if "small" in kind else 2,
        "groups": 8 if "small" in kind else 32,
        "attention": "small" not in kind,
        "lambda_g": "5.0e-3" if "text" in kind else "3.0e-3",
        "of_paper": "x".join(map(str, of_paper)),
        "shape": "x".join(map(str, shape)),
        "factor": sqrt(prod(of_paper) / prod(shape)),
        "detector": _detectors(found).get({"gpu": "-gpu", "paper": "-paper"}.get(kind.split("-")[0], "")),
        "images": images,
        "shards": max(1, images // 1000),
        "tokens": next(tokens for tokens in (16, 32, 64, 77) if tokens >= 1.3 * words or tokens == 77),
    }


def _comment(found: Found, side: int, kind: str) -> str:
    if found.fixed:
        return " # that of the images, or what they are padded to"
    if side >= LARGE or side * 2 > found.side:
        return " # 8, 16, 32 or 64"
    return f" # 8, 16, 32 or 64; {side * 2} takes four times as long" if "small" in kind else " # 8, 16, 32 or 64"


def _names(classes: dict[str, int]) -> str:
    more = len(classes) - SHOWN
    shown = [" ".join(name.split()) for name in classes][:SHOWN]
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _flow(values: dict[str, Any]) -> str:
    """A mapping on one line of YAML; texts that YAML would read otherwise are quoted."""
    plain = {
        key: value
        if re.fullmatch(r"[\w./@~+-]+", value) and yaml.safe_load(value) == value
        else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
    }
    return "{" + ", ".join(f"{key}: {value}" for key, value in plain.items()) + "}"
