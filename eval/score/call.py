"""One call of the command line: what it asks for, applied to sets of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from eval.detectors.clip import ClipImages
from eval.detectors.detectors import load_detector
from eval.detectors.features import FeatureSet
from eval.detectors.reference import Engine, Reference, holds_moments, part_of
from eval.metrics.estimate import Estimate
from eval.metrics.scores import Scored
from eval.pixels.images import ImageSource
from eval.pixels.resize import Geometry
from eval.score.measure import Result, Seen, from_ones, measure
from eval.score.options import Asked, Inputs
from eval.score.prompted import DIVERSITY_GEOMETRY, Chosen, ClipCosines, LpipsDiversity, Machine

PUBLISHED_CLIP = "clip-ViT-g-14"


@dataclass(frozen=True)
class Arm:
    """One set of images: its features, and its values by metric."""

    path: Path
    features: FeatureSet | None
    values: dict[str, Scored]

    @property
    def images(self) -> FeatureSet | Scored:
        """What says which images these are."""
        return self.features or next(iter(self.values.values()))

    def refuse_duplicates(self) -> None:
        """Refuse images that repeat an earlier one.

        Raises:
            UserError: there are some.
        """
        if self.images.duplicates:
            raise UserError(
                f"{self.path}: {self.images.duplicates} of {self.images.source['images']} images repeat an earlier "
                "one: fewer samples than files; give --allow-duplicates if the generator really repeats itself"
            )


@dataclass(frozen=True)
class Call:
    """The networks of what is asked for, each loaded once for all sets."""

    asked: Asked
    inputs: Inputs
    chosen: Chosen
    engine: Engine | None
    clip: ClipCosines | None
    diversity: LpipsDiversity | None

    @staticmethod
    def of(asked: Asked, inputs: Inputs, machine: Machine, first: int | None) -> Call:
        """Load what the metrics need.

        Raises:
            UserError: an input lacks, or weights are missing or changed.
        """
        asked.check(inputs)
        chosen = Chosen(asked.images, first)
        engine, clip, diversity = None, None, None
        if asked.features:
            engine = engine_of(asked, machine)
        if asked.which(needs="captions") and inputs.prompts:
            folder = inputs.clip or machine.weights / PUBLISHED_CLIP
            clip = ClipCosines(folder, inputs.prompts, machine, chosen, _tower(engine, folder))
        if asked.which(needs="images per prompt") and inputs.per_prompt:
            name = asked.diversity_geometry
            geometry = Geometry(name) if name else DIVERSITY_GEOMETRY
            diversity = LpipsDiversity(inputs.per_prompt, machine, chosen, geometry)
        return Call(asked, inputs, chosen, engine, clip, diversity)

    def fill(self, generated: Path, shard: str) -> tuple[int, int]:
        """Put one part of the features into the cache; returns the images done and all images.

        Raises:
            UserError: no such part, or no metric has features.
        """
        process, processes = part_of(shard)
        todo: list[tuple[Engine, ImageSource]] = []
        if self.engine:
            todo.append((self.engine, self.chosen.open(generated, self.engine.geometry)))
            reference = self.inputs.reference
            if reference and self.asked.compared and not holds_moments(reference):
                todo.append((self.engine, self.engine.open(reference)))
        if self.clip:
            todo.append((self.clip.engine, self.clip.open(generated)))
        if not todo:
            raise UserError(f"{', '.join(self.asked.metrics)} has no features to compute in parts: leave --shard away")
        done = sum(engine.fill(source, process, processes) for engine, source in todo)
        return done, sum(len(source) for _, source in todo)

    def reference(self, sampled: bool = False) -> Reference | None:
        """What the metrics compare with, if one does; with `sampled`, images.

        Raises:
            UserError: as `Engine.reference`, or moments where images are needed.
        """
        path = self.inputs.reference
        if path is None or self.engine is None or not self.asked.compared:
            return None
        found = self.engine.reference(path)
        if sampled and "fd" in self.asked.metrics:
            found.rows("--reference-sampled")  # refused now and not after hours of features
        return found

    def arms(self, paths: list[Path]) -> list[Arm]:
        """Features and values of sets; all are opened first, so that what is wrong with them is said at once."""
        engines = [self.chosen.open(path, self.engine.geometry) for path in paths] if self.engine else []
        prompted = {"clip_score": self.clip, "lpips_diversity": self.diversity}
        opened = [{name: (m, m.open(path)) for name, m in prompted.items() if m} for path in paths]
        found = []
        for number, path in enumerate(paths):
            features = self.engine.features(engines[number]) if self.engine else None
            found.append(Arm(path, features, {name: m.scored(source) for name, (m, source) in opened[number].items()}))
        return found

    def results(self, arm: Arm, reference: Reference | None, sampled: bool = False) -> dict[str, Result]:
        """All metrics of a set by the names of their rows.

        Args:
            arm: the set.
            reference: what `reference` gave.
            sampled: the Frechet distance counts the reference's own sampling, too.

        Raises:
            UserError: a value is not finite, or as `measure`.
        """
        values = {name: scored.values for name, scored in arm.values.items()}
        seen = Seen.of(arm.features, reference, values, self.asked.classes, sampled)
        label = arm.features.detector["label"] if arm.features else ""
        words = {"distance": label, "of": label.removeprefix("FID").removeprefix("FD")}
        if self.clip:
            words["clip"] = self.clip.folder.name
        found: dict[str, Result] = {}
        for metric in self.asked.chosen:
            found |= {metric.row.format(number=n, **words): r for n, r in measure(metric, seen).items()}
        if self.asked.ones and reference and arm.features:
            quirk = from_ones(arm.features.features, reference, self.asked.ones)
            row = f"{label}, covariance from ones x {self.asked.ones}"
            beside = {name: found.pop(name) for name in list(found)[len(found) - len(values) :]}  # stand after it
            found |= {row: Result(quirk)} | beside
        for name, result in found.items():
            finite(name, result.estimate)
        return found

    def about(self) -> dict[str, Any]:
        """The protocol, and what the prompted metrics depend on."""
        named = {"protocol": self.asked.about(), "clip-score": self.clip, "lpips-diversity": self.diversity}
        return {key: getattr(value, "about", value) for key, value in named.items() if value}


def finite(name: str, estimate: Estimate) -> Estimate:
    """The estimate of a row.

    Raises:
        UserError: it is not a number.
    """
    if not math.isfinite(estimate.value):
        raise UserError(f"{name} of {estimate.n} images is {estimate.value}: too few or degenerate images")
    return estimate


def differences(arms: list[Arm], results: list[dict[str, Result]]) -> dict[str, Estimate]:
    """All metrics of the second set minus the first by row; the sets share seed and label or prompt at every index.

    Raises:
        UserError: the sets have different numbers of images.
    """
    counts = [len(arm.features) for arm in arms if arm.features]
    if len(set(counts)) > 1:
        raise UserError(
            f"the two sets differ in number of images, {counts[0]} and {counts[1]}: they are not comparable"
        )
    ours, theirs = results
    return {name: finite(name, theirs[name].minus(result).estimate) for name, result in ours.items()}


def engine_of(asked: Asked, machine: Machine) -> Engine:
    """The detector, geometry and cache of what is asked for.

    Raises:
        UserError: none is named, or as `load_detector`.
    """
    if asked.detector is None:
        raise UserError("--detector is missing, for example lite0-320@64")
    geometry = Geometry(asked.geometry)
    detector = load_detector(asked.detector, machine.weights, machine.device)
    return Engine(detector, geometry, machine.cache, machine.batch, machine.workers)


def _tower(engine: Engine | None, folder: Path) -> ClipImages | None:
    """The detector, if it is the very CLIP model in `folder`."""
    detector = engine.detector if engine else None
    if isinstance(detector, ClipImages) and detector.folder.resolve() == folder.resolve():
        return detector
    return None
