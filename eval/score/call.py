"""A call of the command line applied to sets of images: their features, values and metrics."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_labels
from dmd2.data.captions import read_captions
from dmd2.experiment.metrics import METRICS, of_option
from eval.detectors.clip import ClipImages, ClipScore
from eval.detectors.detectors import load_detector
from eval.detectors.features import FeatureSet, identity
from eval.detectors.networks import FeatureNetwork
from eval.detectors.reference import Engine, holds_moments
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import Reference, from_ones
from eval.metrics.measures import Sample, measure
from eval.pixels.images import ImageSource, open_images
from eval.pixels.resize import NONE, Geometry
from eval.score.options import Options
from eval.score.prompted import DIVERSITY_GEOMETRY, ClipCosines, LpipsDiversity

PUBLISHED_CLIP = "clip-ViT-g-14"


@dataclass(frozen=True)
class Arm:
    """One set of images: what it is of, its features, and its values per image or prompt by metric."""

    path: Path
    source: dict[str, Any]
    duplicates: int
    features: FeatureSet | None
    values: dict[str, np.ndarray]

    def refuse_duplicates(self) -> None:
        """Refuse images that repeat an earlier one.

        Raises:
            UserError: there are some.
        """
        if self.duplicates:
            raise UserError(
                f"{self.path}: {self.duplicates} of {self.source['images']} images repeat an earlier one: fewer "
                "samples than files; give --allow-duplicates if the generator really repeats itself"
            )


@dataclass(frozen=True)
class Call:
    """The networks that the options ask for, each loaded once for all sets."""

    options: Options

    @cached_property
    def engine(self) -> Engine:
        """The detector with its geometry and cache.

        Raises:
            UserError: no detector is named, or as `load_detector`.
        """
        if self.options.detector is None:
            raise UserError("--detector is missing, for example lite0-320@64")
        geometry = Geometry(self.options.geometry or NONE.name)
        return self._engine(load_detector(self.options.detector, self.options.weights, self.options.device), geometry)

    def _engine(self, detector: FeatureNetwork, geometry: Geometry) -> Engine:
        return Engine(detector, geometry, self.options.cache, self.options.batch, self.options.workers)

    @cached_property
    def prompted(self) -> dict[str, ClipCosines | LpipsDiversity]:
        """The networks that score images of prompts, by metric.

        Raises:
            UserError: weights or captions are missing or damaged.
        """
        options, found = self.options, dict[str, ClipCosines | LpipsDiversity]()
        if options.prompts and options.which(needs="captions"):
            captions = read_captions(options.prompts)[: options.first]
            found["clip_score"] = ClipCosines(self._clip_score, self._engine, options.prompts, captions)
        if options.per_prompt and options.which(needs="images per prompt"):
            # a protocol's geometry is that of its Frechet distance
            own = options.given.get("geometry")
            geometry = Geometry(own) if own else DIVERSITY_GEOMETRY
            found["lpips_diversity"] = LpipsDiversity(
                options.per_prompt, geometry, options.weights, options.device, options.workers
            )
        return found

    def _clip_score(self) -> ClipScore:
        """CLIP as `--clip` names it; the detector's own model where that is the same, so that it is loaded once."""
        folder = self.options.clip or self.options.weights / PUBLISHED_CLIP
        tower = self.engine.detector if self.options.features else None
        if not isinstance(tower, ClipImages) or tower.folder.resolve() != folder.resolve():
            tower = None
        return ClipScore(folder, self.options.device, tower)

    def open(self, path: Path) -> dict[str, ImageSource]:
        """A set as each network sees it, by `Metric.sees`."""
        first, images, found = self.options.first, self.options.images, dict[str, ImageSource]()
        if self.options.features:
            found["detector"] = open_images(path, self.engine.geometry, first, images)
        for name, network in self.prompted.items():
            source = found[METRICS[name].sees] = open_images(path, network.geometry, first, images)
            network.check(path, len(source))
        return found

    def fill(self, generated: Path, share: str) -> tuple[int, int]:
        """Put a share ``i/k`` of the features into the cache; returns the number of images done and of all images.

        Raises:
            UserError: no such share, or no metric has features.
        """
        process, sources, todo = share_of(share), self.open(generated), []
        if self.options.features:
            todo.append((self.engine, sources["detector"]))
            reference = self.options.reference
            if reference and self.options.compared and not holds_moments(reference):
                todo.append((self.engine, open_images(reference, self.engine.geometry)))
        if isinstance(clip := self.prompted.get("clip_score"), ClipCosines):
            todo.append((clip.engine, sources["clip"]))
        if not todo:
            metrics = ", ".join(self.options.metrics)
            raise UserError(f"{metrics} has no features to compute in parts: leave --shard away")
        done = sum(engine.fill(source, *process) for engine, source in todo)
        return done, sum(len(source) for _, source in todo)

    def reference(self) -> Reference | None:
        """The reference, if a metric needs one.

        Raises:
            UserError: as `Engine.reference`, or moments where images are needed.
        """
        if self.options.reference is None or not self.options.compared:
            return None
        found = self.engine.reference(self.options.reference)
        if self.options.counts_reference:
            found.rows("--reference-sampled")  # refused now and not after hours of features
        return found

    def arm(self, path: Path, sources: dict[str, ImageSource]) -> Arm:
        """Features and values of a set that `open` opened."""
        features = self.engine.features(sources["detector"]) if self.options.features else None
        scored = {name: network.scored(sources[METRICS[name].sees]) for name, network in self.prompted.items()}
        values = {name: found for name, (found, _) in scored.items()}
        repeats = features.duplicates if features else next(iter(scored.values()))[1]
        source = next(iter(sources.values()))
        return Arm(path, identity(source) | {"channels": source.batch(range(1)).shape[1]}, repeats, features, values)

    def results(self, arm: Arm, reference: Reference | None) -> dict[str, Estimate]:
        """All metrics of a set by the names of their rows; image i is of class ``i mod classes``.

        Raises:
            UserError: a value is not finite, or as `measure`.
        """
        options, features, samples, words, quirk = self.options, arm.features, {}, {}, {}
        indices = list(range(arm.source["images"]))
        labels = None if options.classes is None else sample_labels(indices, options.classes, "cyclic")
        if features:
            label, logits = features.detector["label"], features.found.get("logits")
            words = {"distance": label, "of": label.removeprefix("FID").removeprefix("FD")}
            samples["detector"] = Sample(
                features.features,
                logits,
                features.detector["name"],
                reference,
                labels,
                labels,
                options.reference_sampled,
                options.device,
            )
            if options.ones and reference:
                row = f"{label}, covariance from ones x {options.ones}"
                quirk[row] = from_ones(features.features, reference, options.ones)
        if isinstance(clip := self.prompted.get("clip_score"), ClipCosines):
            words["clip"] = clip.score.folder.name
        found: dict[str, Estimate] = {}
        for sees in ("detector", "clip", "lpips"):
            for metric in map(of_option, options.which(sees=sees)):
                numbers = measure(metric, samples, arm.values, labels)
                found |= {metric.row.format(number=name, **words): number for name, number in numbers.items()}
            found |= quirk  # after the metrics of features
        return finite(found)

    def about(self) -> dict[str, Any]:
        """The protocol, and what the prompted metrics depend on, by the option of each."""
        protocol = self.options.about()
        found = {} if protocol is None else {"protocol": protocol}
        return found | {str(METRICS[name].option): network.about for name, network in self.prompted.items()}


def share_of(text: str) -> tuple[int, int]:
    """Process and number of processes from ``i/k``.

    Raises:
        UserError: written otherwise.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise UserError(f"{text!r} is no shard: write i/k with i from 0 to k - 1, for example 0/8")
    return int(match[1]), int(match[2])


def finite(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """The estimates of rows.

    Raises:
        UserError: one is not a number.
    """
    for name, estimate in found.items():
        if not math.isfinite(estimate.value):
            raise UserError(f"{name} of {estimate.n} images is {estimate.value}: too few or degenerate images")
    return found


def differences(arms: list[Arm], results: list[dict[str, Estimate]]) -> dict[str, Estimate]:
    """All metrics of the second set minus the first by row; the sets share seed and label or prompt at every index.

    Raises:
        UserError: the sets have different numbers of images.
    """
    counts = [len(arm.features) for arm in arms if arm.features]
    if len(set(counts)) > 1:
        raise UserError(
            f"the two sets differ in number of images, {counts[0]} and {counts[1]}: they are not comparable; if their "
            f"first images share seeds, give --first {min(counts)}"
        )
    ours, theirs = results
    return finite({name: theirs[name].minus(estimate) for name, estimate in ours.items()})
