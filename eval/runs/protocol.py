"""The evaluation section of a run, applied: from a sampler to the numbers of its images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.core.files import content_of, digest_of, listing
from dmd2.core.rng import sample_labels
from dmd2.data.captions import EvalPrompts
from dmd2.data.sets import save_shard
from dmd2.experiment.config import RunConfig
from dmd2.experiment.eval_config import Eval
from dmd2.experiment.metrics import FRECHET, METRICS, measured
from dmd2.experiment.protocols import named, ranks_of
from dmd2.experiment.run_inputs import FEATURES, REAL, measured_with
from eval.detectors.alignment import Alignment
from eval.detectors.detectors import load_detector
from eval.detectors.features import account, extract, join, shards_of
from eval.detectors.networks import FeatureNetwork
from eval.detectors.reading import Sampled
from eval.detectors.reference import Engine
from eval.metrics import appearance
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import Reference, describe, from_ones
from eval.metrics.measures import Sample, cosines, measure
from eval.pixels.resize import Geometry

Generate = Callable[[list[int]], Tensor]  # sample seeds to images in [-1, 1]


class Observers:
    """A detector and all else that looks at the images of a run, so that one pass and one cache serve every metric.

    Args:
        detector: gives ``features`` and ``logits``.
        geometry: what is done to an image before it.
        others: more networks by the name of their features, each with a geometry of its own.
        statistics: functions of `eval.metrics.appearance`, of images as they were generated. ``brightness``, of what
            the detector sees, is always there.
    """

    def __init__(
        self,
        detector: FeatureNetwork,
        geometry: Geometry,
        others: dict[str, tuple[FeatureNetwork, Geometry]],
        statistics: list[str],
    ) -> None:
        self.detector, self.geometry, self.others, self.statistics = detector, geometry, others, statistics
        self.name, self.label, self.device = detector.name, detector.label, detector.device
        beside = {name: [account(network), where.name] for name, (network, where) in others.items()}
        seen = {"geometry": geometry.name, "others": beside, "statistics": statistics}
        self.about: dict[str, Any] = {**detector.about, **seen}

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """See `eval.detectors.features.Observer`; `images` are as they were generated."""
        seen = self.geometry(images)
        found = self.detector.look(seen) | {"brightness": appearance.brightness(seen)}
        found |= {name: network(geometry(images))[0] for name, (network, geometry) in self.others.items()}
        return found | {name: getattr(appearance, name)(images) for name in self.statistics}


@dataclass(frozen=True)
class Protocol:
    """Everything a number depends on besides the weights; `names` says it in words.

    `patch` is the reference of the second distance, `alignment` what compares images with their captions; both are
    None where they are not measured.
    """

    cfg: RunConfig
    detector: FeatureNetwork
    reference: Reference
    names: dict[str, Any]
    patch: Reference | None = None
    alignment: Alignment | None = None

    @staticmethod
    def of(cfg: RunConfig, device: torch.device) -> "Protocol":
        """Load what the run's eval section names.

        Raises:
            UserError: a detector or reference is missing.
        """
        spec, read = cfg.eval, measured_with(cfg)
        detector = load_detector(spec.detector, device=device)
        wanted = [METRICS[name] for name in spec.metrics]
        moments, images = read["reference"], REAL / spec.reference / "manifest.json"
        engine = Engine(detector, Geometry(spec.geometry), FEATURES, spec.batch)
        reference = engine.reference(images if any("reference images" in m.needs for m in wanted) else moments)
        settings = ("geometry", "images", "draws", "labels", "rounding", "precision", "covariance_init")
        names: dict[str, Any] = {
            "protocol": spoken(spec),
            "detector": describe(read["detector"]),
            "reference": counted(moments, reference),
            **{key: getattr(spec, key) for key in settings},
        }
        patch = alignment = None
        if spec.patch is not None and any(m.sees == "patch" for m in wanted):
            patch = replace(engine, geometry=Geometry(spec.patch.geometry)).reference(read["patch_reference"])
            names["patch"] = f"{spec.patch.geometry}, {counted(read['patch_reference'], patch)}"
        if not cfg.data.labelled:
            names["labels"] = "none"
        if (prompts := EvalPrompts.of(cfg)) is not None:
            names["labels"] = "by prompt"
            names |= {n: f"{read[n].parent.name}@{content_of(read[n])[:8]}" for n in ("prompts", "pipeline")}
            names["prompts"] += f" ({len(prompts.captions)} captions)"
            if any(m.sees == "clip" for m in wanted):
                alignment = Alignment.load(read["clip"], prompts, device)
                names["clip"] = describe(read["clip"])
        return Protocol(cfg, detector, reference, names, patch, alignment)

    def measure(self, generate: Generate, identity: dict[str, Any], scratch: Path) -> dict[str, Estimate]:
        """Numbers by name, averaged over draws; draw d has the sample seeds d*images ... (d+1)*images - 1.

        The distance of the detector is always among them: paired differences of runs need its influences.

        Args:
            generate: makes the images.
            identity: what the images depend on besides this protocol; it addresses the cached features.
            scratch: folder of those features, so that an evaluation that was killed goes on.
        """
        draws = [self._numbers(source, first, scratch) for first, source in self._draws(generate, identity)]
        return {name: average([draw[name] for draw in draws]) for name in draws[0]}

    def fill(self, generate: Generate, identity: dict[str, Any], scratch: Path, part: int) -> None:
        """Put the features that fall to job `part` of ``eval.shards`` into `scratch`, for `measure` to find there."""
        spec = self.cfg.eval
        for _, source in self._draws(generate, identity):
            extract(source, self._observers, scratch, shards_of(spec.images, part, spec.shards), spec.batch)

    @property
    def distance(self) -> str:
        """The metric of the detector's Frechet distance: ``fd`` or ``fid``."""
        return next((name for name in self.cfg.eval.metrics if name in FRECHET), FRECHET[0])

    def as_json(self, found: dict[str, Estimate]) -> dict[str, Any]:
        """Values of the metrics that are asked for, and their estimates with standard error, interval and bias."""
        asked = {name: found[name] for name in measured(self.cfg.eval.metrics)}
        values = {name: estimate.value for name, estimate in asked.items()}
        return {**values, "estimates": {name: estimate.as_json() for name, estimate in asked.items()}}

    @cached_property
    def _observers(self) -> Observers:
        spec, others = self.cfg.eval, dict[str, tuple[FeatureNetwork, Geometry]]()
        if self.patch is not None and spec.patch is not None:
            others["patch"] = self.detector, Geometry(spec.patch.geometry)
        if self.alignment is not None:
            others["clip"] = self.alignment.model.images, self.alignment.model.geometry
        statistics = [name for name in spec.metrics if METRICS[name].sees == "pixels" and name != "brightness"]
        return Observers(self.detector, Geometry(spec.geometry), others, statistics)

    def _draws(self, generate: Generate, identity: dict[str, Any]) -> Iterator[tuple[int, Sampled]]:
        """First sample seed and images of every draw."""
        spec = self.cfg.eval
        about = {**identity, **{key: getattr(spec, key) for key in ("rounding", "labels", "precision")}}
        about |= {key: self.names[key] for key in ("prompts", "pipeline") if key in self.names}
        for first in range(0, spec.draws * spec.images, spec.images):

            def images(rows: list[int], first: int = first) -> Tensor:
                return generate([first + row for row in rows])

            name = digest_of({**about, "first": first})
            yield first, Sampled(name, spec.images, sample=images, rounding=spec.rounding)

    def _numbers(self, source: Sampled, first: int, scratch: Path) -> dict[str, Estimate]:
        """The metrics of one draw by number."""
        spec, classes = self.cfg.eval, self.cfg.data.classes
        seeds = list(range(first, first + spec.images))
        found = join(extract(source, self._observers, scratch, batch=spec.batch), spec.images).found
        labels = sample_labels(seeds, classes, spec.labels) if classes else None
        # Only labels that are fixed beforehand are strata: with random ones their numbers vary, too.
        strata = labels if spec.labels == "cyclic" else None
        logits = found.get("logits")
        name, place = self.detector.name, self.detector.device
        whole = Sample(found["features"], logits, name, self.reference, labels, strata, device=place)
        samples = {"detector": whole}
        if self.patch is not None:
            samples["patch"] = replace(whole, features=found["patch"], logits=None, reference=self.patch)
        values = {name: found[name] for name in ("brightness", *self._observers.statistics)}
        if self.alignment is not None:
            values["clip_score"] = cosines(found["clip"], self.alignment.texts(seeds))
        numbers: dict[str, Estimate] = {}
        for name in {self.distance: None} | dict.fromkeys(spec.metrics):
            numbers |= measure(METRICS[name], samples, values, strata)
        if ranks := ranks_of(spec.covariance_init):
            quirk = from_ones(found["features"], self.reference, ranks).value
            numbers[self.distance] = replace(numbers[self.distance], value=quirk)
        return numbers


def counted(moments: Path, reference: Reference) -> str:
    """A reference with its digest and number of images."""
    return f"{describe(moments)} ({reference.about['images'] or 'unknown number of'} images)"


def spoken(spec: Eval) -> str | None:
    """Name of the protocol and what was changed of it: ``coco10k, but images 2000``."""
    if spec.protocol is None:
        return None
    protocol = named(spec.protocol)
    wanted, given = protocol.for_a_base(), spec.model_dump(mode="json")
    return protocol.title({key: given[key] for key in wanted if given[key] != wanted[key]})


def average(draws: list[Estimate]) -> Estimate:
    """Mean of estimates from independent draws, with the influences of all their images."""
    errors = [e.se for e in draws if e.se is not None]
    biases = [e.bias for e in draws if e.bias is not None]
    influences = [e.influence for e in draws if e.influence is not None]
    return Estimate(
        float(np.mean([e.value for e in draws])),
        float(np.sqrt(np.sum(np.square(errors)))) / len(draws) if len(errors) == len(draws) else None,
        sum(e.n for e in draws),
        float(np.mean(biases)) if len(biases) == len(draws) else None,
        np.concatenate(influences) if influences else None,
    )


def save_influence(path: Path, distance: str, found: dict[int, dict[str, Estimate]]) -> list[dict[str, Any]]:
    """Write the influences on the `distance` by step, those on other metrics by ``step-metric``.

    Returns:
        Entries of a manifest.
    """
    tensors = {}
    for step, numbers in found.items():
        for name, estimate in numbers.items():
            if estimate.influence is not None and name in METRICS and METRICS[name].has_influence:
                key = f"{step:07d}" if name == distance else f"{step:07d}-{name}"
                tensors[key] = torch.from_numpy(estimate.influence.astype(np.float32))
    save_shard(path, tensors)
    return listing([path], path.parent)
