"""One call of the command line: what it asks for, applied to sets of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.core.errors import UserError
from eval.detectors.clip import ClipImages
from eval.detectors.detectors import load_detector
from eval.detectors.features import FeatureSet
from eval.detectors.reference import Engine, Reference, holds_moments, part_of
from eval.metrics.estimate import Estimate
from eval.metrics.scores import Scored, mean_estimate, paired_mean
from eval.pixels.images import ImageSource
from eval.pixels.resize import Geometry
from eval.score.measure import compare, cyclic, from_ones, measure
from eval.score.options import CLIP, DIVERSITY, Asked, Inputs
from eval.score.prompted import DIVERSITY_GEOMETRY, Chosen, ClipCosines, LpipsDiversity, Machine

PUBLISHED_CLIP = "clip-ViT-g-14"


@dataclass(frozen=True)
class Arm:
    """One set of images: its features, and its values by the name of their row."""

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
        if CLIP in asked.metrics and inputs.prompts:
            folder = inputs.clip or machine.weights / PUBLISHED_CLIP
            clip = ClipCosines(folder, inputs.prompts, machine, chosen, _tower(engine, folder))
        if DIVERSITY in asked.metrics and inputs.per_prompt:
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
            raise UserError(f"{DIVERSITY} has no features to compute in parts: leave --shard away")
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
        prompted = [metric for metric in (self.clip, self.diversity) if metric]
        opened = [[metric.open(path) for metric in prompted] for path in paths]
        found = []
        for number, path in enumerate(paths):
            features = self.engine.features(engines[number]) if self.engine else None
            pairs = zip(prompted, opened[number], strict=True)
            found.append(Arm(path, features, {metric.name: metric.scored(source) for metric, source in pairs}))
        return found

    def estimates(self, arm: Arm, reference: Reference | None, sampled: bool = False) -> dict[str, Estimate]:
        """All metrics of a set by the names of their rows."""
        found: dict[str, Estimate] = {}
        if arm.features:
            found |= measure(arm.features, reference, self.asked.features, self.asked.classes, sampled)
            if self.asked.ones and reference:
                found |= from_ones(arm.features, reference, self.asked.ones)
        return found | {name: mean_estimate(s.values, self._strata(name, s)) for name, s in arm.values.items()}

    def differences(self, a: Arm, b: Arm, reference: Reference | None) -> dict[str, Estimate]:
        """All metrics of `b` minus `a`, sets that share seed and label or prompt at every index."""
        found: dict[str, Estimate] = {}
        if a.features and b.features:
            found |= compare(a.features, b.features, reference, self.asked.features, self.asked.classes)
            if self.asked.ones and reference:
                ours, theirs = (from_ones(f, reference, self.asked.ones) for f in (a.features, b.features))
                found |= {name: Estimate(theirs[name].value - e.value, None, e.n) for name, e in ours.items()}
        for name, scored in a.values.items():
            found[name] = paired_mean(scored.values, b.values[name].values, self._strata(name, scored))
        return found

    def about(self) -> dict[str, Any]:
        """The protocol, and what the prompted metrics depend on."""
        named = {"protocol": self.asked.about(), CLIP: self.clip, DIVERSITY: self.diversity}
        return {key: getattr(value, "about", value) for key, value in named.items() if value}

    def _strata(self, name: str, scored: Scored) -> Tensor | None:
        """Class of every value; a prompt's diversity is a class of its own."""
        is_per_image = self.clip is not None and name == self.clip.name
        return cyclic(len(scored.values), self.asked.classes) if is_per_image else None


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
