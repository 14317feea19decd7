"""How a sampler of a run becomes numbers: its evaluation section, applied."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.core.files import content_of, digest_of, listing
from dmd2.core.rng import sample_labels
from dmd2.data.prompts import EvalPrompts
from dmd2.data.sets import save_shard
from dmd2.experiment.config import RunConfig
from dmd2.experiment.eval_config import Eval
from dmd2.experiment.metrics import FRECHET, METRICS
from dmd2.experiment.protocols import named, ranks_of
from dmd2.experiment.run_inputs import REAL, measured_with
from dmd2.networks.quantise import quantise
from eval.detectors.alignment import Alignment, load_towers
from eval.detectors.detectors import Detector, load_detector
from eval.detectors.features import Sampled, extract, join, share
from eval.detectors.reference import FEATURES, Engine, Reference
from eval.metrics.estimate import Estimate
from eval.metrics.scores import cosines
from eval.metrics.stats import describe
from eval.pixels.resize import Geometry
from eval.runs.columns import Tap, Taps
from eval.score.measure import Seen, from_ones, measure

Sample = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Measured:
    """Estimates by metric, and the influence of every image on the Frechet distance, for paired differences.

    `others` are the influences on the metrics that have their own: the patch's distance and the CLIP score.
    """

    estimates: dict[str, Estimate]
    influence: np.ndarray
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Values by metric, and the estimates with standard error, interval and bias."""
        values = {name: estimate.value for name, estimate in self.estimates.items()}
        return {**values, "estimates": {name: estimate.as_json() for name, estimate in self.estimates.items()}}


@dataclass(frozen=True)
class Protocol:
    """Everything a number depends on besides the weights.

    `patch` is the reference of the second distance, `alignment` what compares images with their captions; both are
    None where they are not measured.
    """

    cfg: RunConfig
    detector: Detector
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
        names: dict[str, Any] = {
            "protocol": spoken(spec), "geometry": spec.geometry,
            "detector": describe(read["detector"]),
            "reference": counted(moments, reference),
            "images": spec.images, "draws": spec.draws, "labels": spec.labels,
            "rounding": spec.rounding, "precision": spec.precision, "covariance_init": spec.covariance_init,
        }  # fmt: skip
        patch = alignment = None
        if spec.patch is not None and any(m.sees == "patch" for m in wanted):
            geometry = Geometry(spec.patch.geometry)
            patch = Engine(detector, geometry, FEATURES, spec.batch).reference(read["patch_reference"])
            names["patch"] = f"{geometry.name}, {counted(read['patch_reference'], patch)}"
        if (prompts := EvalPrompts.of(cfg)) is not None:
            names["labels"] = "by prompt"
            names |= {n: f"{read[n].parent.name}@{content_of(read[n])[:8]}" for n in ("prompts", "pipeline")}
            names["prompts"] += f" ({len(prompts.captions)} captions)"
            if any(m.sees == "clip" for m in wanted):
                alignment = Alignment(load_towers(read["clip"], device), prompts)
                names["clip"] = describe(read["clip"])
        return Protocol(cfg, detector, reference, names, patch, alignment)

    def measure(self, sample: Sample, identity: dict[str, Any], scratch: Path) -> Measured:
        """Metrics of a sampler, averaged over draws; draw d uses the sample seeds d*images ... (d+1)*images - 1.

        Args:
            sample: seeds to images in [-1, 1].
            identity: what the images depend on besides this protocol; it addresses the cached features.
            scratch: folder of those features, so that an evaluation that was killed goes on.
        """
        draws = [self._draw(sample, identity, scratch, first) for first in self._firsts()]
        return Measured(
            {name: average([draw.estimates[name] for draw in draws]) for name in draws[0].estimates},
            np.concatenate([draw.influence for draw in draws]),
            {name: np.concatenate([draw.others[name] for draw in draws]) for name in draws[0].others},
        )

    def fill(self, sample: Sample, identity: dict[str, Any], scratch: Path, part: int) -> None:
        """Put the features that fall to job `part` of ``eval.shards`` into `scratch`, for `measure` to find there."""
        spec = self.cfg.eval
        rows = share(spec.images, part, spec.shards)
        for first in self._firsts():
            extract(self._source(sample, identity, first), self._taps, scratch, rows, batch=spec.batch)

    def _firsts(self) -> range:
        """First sample seed of every draw."""
        return range(0, self.cfg.eval.draws * self.cfg.eval.images, self.cfg.eval.images)

    @cached_property
    def _taps(self) -> Taps:
        """All that sees the images."""
        spec = self.cfg.eval
        others: dict[str, Tap] = {}
        if self.patch is not None and spec.patch is not None:
            others["patch"] = Tap(self.detector, Geometry(spec.patch.geometry))
        if self.alignment is not None:
            others["clip"] = Tap(self.alignment.towers.images, self.alignment.towers.geometry)
        pixels = [name for name, metric in METRICS.items() if metric.sees == "pixels" and name != "brightness"]
        statistics = [name for name in pixels if name in spec.metrics]
        return Taps(self.detector, Geometry(spec.geometry), others, statistics)

    def _source(self, sample: Sample, identity: dict[str, Any], first: int) -> Sampled:
        spec = self.cfg.eval

        def images(indices: list[int]) -> Tensor:
            return quantise(sample([first + i for i in indices]), spec.rounding)

        text: dict[str, Any] = {name: self.names[name] for name in ("prompts", "pipeline") if name in self.names}
        how = {"rounding": spec.rounding, "labels": spec.labels, "precision": spec.precision}
        about = {**identity, "first": first, **how, **text}
        return Sampled(digest_of(about), spec.images, images)

    def _draw(self, sample: Sample, identity: dict[str, Any], scratch: Path, first: int) -> Measured:
        spec, source, taps = self.cfg.eval, self._source(sample, identity, first), self._taps
        seeds = list(range(first, first + spec.images))
        joined = join(extract(source, taps, scratch, batch=spec.batch), spec.images)
        texts = None if self.alignment is None else self.alignment.texts(seeds)
        widths: dict[str, int] = {} if self.patch is None else {"patch": len(self.patch.stats.mean)}
        if texts is not None:
            widths["clip"] = texts.shape[1]
        columns = taps.split(joined.features, len(self.reference.stats.mean), widths)
        classes = self.cfg.data.classes
        labels = sample_labels(seeds, classes, spec.labels) if classes else None
        # Only labels that are fixed beforehand are strata: with random ones their numbers vary, too.
        strata = labels if spec.labels == "cyclic" else None
        features, values = {"detector": columns.features}, dict(columns.statistics)
        references = {"detector": self.reference}
        if self.patch is not None:
            features["patch"], references["patch"] = columns.others["patch"], self.patch
        if texts is not None:
            values["clip_score"] = cosines(columns.others["clip"], texts)
        seen = Seen(features, joined.logits, self.detector.name, values, references, labels, strata)
        distance = next((name for name in spec.metrics if name in FRECHET), FRECHET[0])
        results = {name: measure(METRICS[name], seen) for name in {distance: None} | dict.fromkeys(spec.metrics)}
        found = {number: r.estimate for name in spec.metrics for number, r in results[name].items()}
        influence = {name: results[name][name].influence for name in results if METRICS[name].has_influence}
        if (ranks := ranks_of(spec.covariance_init)) and distance in found:
            quirk = from_ones(columns.features, self.reference, ranks).value
            found[distance] = replace(found[distance], value=quirk)
        return Measured(found, influence.pop(distance), influence)


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
    """Mean of estimates from independent draws."""
    errors = [e.se for e in draws if e.se is not None]
    biases = [e.bias for e in draws if e.bias is not None]
    return Estimate(
        float(np.mean([e.value for e in draws])),
        float(np.sqrt(np.sum(np.square(errors)))) / len(draws) if len(errors) == len(draws) else None,
        sum(e.n for e in draws),
        float(np.mean(biases)) if len(biases) == len(draws) else None,
    )


def save_influence(path: Path, measured: dict[int, Measured]) -> list[dict[str, Any]]:
    """Write influences by step, and those of further metrics by ``step-metric``; returns entries of a manifest."""
    psi = {f"{step:07d}": found.influence for step, found in measured.items()}
    psi |= {f"{step:07d}-{name}": values for step, found in measured.items() for name, values in found.others.items()}
    save_shard(path, {name: torch.from_numpy(values.astype(np.float32)) for name, values in psi.items()})
    return listing([path], path.parent)
