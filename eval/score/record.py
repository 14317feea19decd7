"""The record of a call: its numbers with everything that they depend on, and warnings; printed and written to files."""

from __future__ import annotations

import math
import platform
import sys
from importlib.metadata import version
from typing import Any

import pandas as pd
from scipy.special import stdtrit

from dmd2.core.files import write_json, write_text
from dmd2.core.run import commit
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import Reference
from eval.score.call import Arm
from eval.score.options import Options

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "timm", "open-clip-torch")
IMAGES_PER_DIMENSION = 4  # below, the bias estimate is off by more than about 16 %


def warnings(arm: Arm, reference: Reference | None, options: Options) -> list[str]:
    """Warnings about the numbers of a set and its reference."""
    found, n, classes = [], arm.source["images"], options.classes
    if arm.features is not None and reference is not None:
        found += _sizes(n, arm.features.features.shape[1], reference, options.counts_reference)
        if arm.source["id"] == reference.about.get("id"):
            found.append("the generated images are those of the reference: every distance is 0 but for rounding")
        others = [name for name in ("prdc", "pr") if name in options.metrics and n != reference.about["images"]]
        if others:
            sizes = f"{n} generated and {reference.about['images']} reference images"
            found.append(f"{', '.join(others)} of {sizes}: values depend on both numbers, compare at equal ones only")
    if classes is not None and n % classes:
        found.append(f"{n} images are not a multiple of {classes} classes: the classes are not balanced")
    if arm.source.get("channels") == 1 and arm.features and not arm.features.detector["name"].endswith("-classifier"):
        found.append("the generated images are grey, and the detector is for colour: it sees their channel three times")
    if arm.source["small"]:
        found.append(f"{arm.source['small']} generated images are smaller than the patch")
    if arm.duplicates:
        found.append(f"{arm.duplicates} generated images repeat an earlier one")
    return found


def _sizes(n: int, d: int, reference: Reference, reference_sampled: bool) -> list[str]:
    """Warnings about n images of d dimensions and their reference."""
    found = []
    if n < 2 * d:
        found.append(f"{n} images for {d} dimensions: below {2 * d} there is no standard error and no bias estimate")
    elif n < IMAGES_PER_DIMENSION * d:
        found.append(f"{n} images for {d} dimensions: below {IMAGES_PER_DIMENSION * d} the bias estimate is unreliable")
    if reference.detector is None:
        found.append(f"{reference.about['path']} does not say which resize made it; that of the detector is assumed")
    images = reference.about["images"]
    if images is not None and images <= d:
        found.append(f"the reference has {images} images for {d} dimensions: its covariance is rank-deficient")
    if reference_sampled and images < 2 * d:
        found.append(f"the reference has {images} images: below {2 * d} its sampling error is not known")
    return found


def verdict(difference: Estimate, margin: float | None = None) -> str:
    """What a paired difference ``b - a`` shows at 95 %, for one pair of runs.

    ``equivalent``: two one-sided tests at 5 % place it inside ``+-margin``; ``b is lower`` or ``b is higher``: the
    interval excludes 0; otherwise ``undecided``, with the number of images that would decide a difference of this size.
    """
    interval = difference.interval
    if difference.se is None or interval is None:
        return "undecided: no standard error"
    centre = sum(interval) / 2
    if margin is not None and abs(centre) + stdtrit(difference.n - 1, 0.95) * difference.se < margin:
        return f"equivalent within {margin:g}"
    if interval[0] > 0 or interval[1] < 0:
        return "b is higher" if centre > 0 else "b is lower"
    if not centre:
        return "undecided: no difference seen"
    needed = math.ceil(difference.n * (1.96 * difference.se / centre) ** 2)
    return f"undecided: about {needed} images would be needed"


def provenance(arm: Arm, reference: Reference | None, options: Options, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything a number depends on besides the images: it is the same for all numbers of one call."""
    n, classes = arm.source["images"], options.classes
    drawn = "counts the sampling of the reference, too" if options.counts_reference else "takes the reference as fixed"
    return {
        "detector": arm.features.detector if arm.features else None,
        "reference": None if reference is None else reference.about,
        "geometry": arm.source["geometry"],
        "n": n,
        "samples": f"0..{n - 1}",
        "labels": None if classes is None else f"index mod {classes}",
        "interval": f"95 % around value - bias; FD {drawn}; with labels, within classes",
        "warnings": options.unused() + warnings(arm, reference, options),
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def versions() -> dict[str, str]:
    """Versions of Python, of what computes the numbers, and of this repository."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "commit": commit()}


def publish(document: dict[str, Any], options: Options) -> None:
    """Warnings to stderr, the table to stdout, everything to the files asked for."""
    for warning in document["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    rows = pd.DataFrame(document["rows"])
    if options.json:
        write_json(options.json, document)
    if options.csv:
        write_text(options.csv, rows.assign(**_columns(document)).to_csv(index=False))
    print("\n".join(_header(document)))
    shown = rows.astype(object).where(rows.notna(), "-").map(lambda x: f"{x:.6g}" if isinstance(x, float) else x)
    print(shown.to_string(index=False))


def _columns(document: dict[str, Any]) -> dict[str, Any]:
    """Columns of the CSV that describe the protocol; they are the same in every line."""
    detector, reference = document["detector"] or {}, document["reference"] or {}
    clip, diversity = document.get("clip-score", {}), document.get("lpips-diversity", {})
    return {
        "protocol": document.get("protocol", {}).get("title"),
        "detector": detector.get("name"),
        "weights": detector.get("weights"),
        "reference": reference.get("id"),
        **{name: document[name] for name in ("geometry", "labels", "samples", "interval")},
        "clip": clip.get("weights"),
        "prompts": clip.get("prompts_sha256"),
        "per_prompt": diversity.get("per_prompt"),
        "seconds": sum(document["seconds"].values()),
        **document["versions"],
    }


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
    if any(row["metric"] == "KID" for row in document["rows"]):
        lines.append("KID is not multiplied: papers often print 100 or 1000 times this")
    if clip := document.get("clip-score"):
        lines.append(
            f"{clip['protocol']}, {clip['scale']}, geometry {clip['geometry']}, {n}, prompts {clip['prompts']}"
        )
    if diversity := document.get("lpips-diversity"):
        each = f"{diversity['per_prompt']} images of each prompt"
        lines.append(f"{diversity['network']}, geometry {diversity['geometry']}, {n}, {each}")
    return lines
