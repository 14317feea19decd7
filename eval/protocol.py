"""How a sampler of a run becomes numbers: its evaluation section, applied."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.config import RunConfig
from dmd2.data import save_shard
from dmd2.errors import UserError
from dmd2.eval_config import Eval
from dmd2.files import digest_of, listing
from dmd2.inputs import REAL, measured_with
from dmd2.quantise import quantise
from dmd2.rng import sample_labels
from eval.detectors import Detector, load_detector
from eval.estimate import Estimate
from eval.features import FeatureSet, Sampled, account, extract, join, share
from eval.measure import METRICS, from_ones
from eval.protocols import named, ranks_of
from eval.reference import FEATURES, Engine, Reference
from eval.resize import Geometry
from eval.scores import mean_estimate
from eval.stats import describe

# What eval.metrics may name, and the engine's metric behind it.
KNOWN = {"fd": "fd", "fid": "fd", "kid": "kid", "prdc": "prdc", "is": "is", "accuracy": "accuracy", "brightness": ""}
NEEDS_IMAGES = {"kid", "prdc"}  # of the reference; moments do for the others

Sample = Callable[[list[int]], Tensor]


class WithBrightness:
    """A detector whose last feature is the image's mean on the scale 0..1, so that one cache holds both."""

    def __init__(self, detector: Detector) -> None:
        self.inner, self.name, self.label, self.is_fid = detector, detector.name, detector.label, detector.is_fid
        self.about = {**detector.about, "brightness": "last feature"}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(n, d + 1)`` and logits."""
        features, logits = self.inner(images)
        mean = images.double().mean(dim=(1, 2, 3)) / 255
        return torch.cat([features.double().cpu(), mean[:, None].cpu()], dim=1).float(), logits


@dataclass(frozen=True)
class Measured:
    """Estimates by metric, and the influence of every image on the Frechet distance, for paired differences."""

    estimates: dict[str, Estimate]
    influence: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Values by metric, and the estimates with standard error, interval and bias."""
        values = {name: estimate.value for name, estimate in self.estimates.items()}
        return {**values, "estimates": {name: estimate.as_json() for name, estimate in self.estimates.items()}}


@dataclass(frozen=True)
class Protocol:
    """Everything a number depends on besides the weights."""

    cfg: RunConfig
    detector: Detector
    reference: Reference
    names: dict[str, Any]

    @staticmethod
    def of(cfg: RunConfig, device: torch.device) -> "Protocol":
        """Load what the run's eval section names.

        Raises:
            UserError: a metric is unknown or misnamed, or a detector or reference is missing.
        """
        detector = load_detector(cfg.eval.detector, device=device)
        for name in cfg.eval.metrics:
            if name not in KNOWN:
                raise UserError(f"eval.metrics: {name} cannot be measured by this version; known: {', '.join(KNOWN)}")
            if name in ("fd", "fid") and (name == "fid") != detector.is_fid:
                right = "fid" if detector.is_fid else "fd: only the canonical Inception features give an FID"
                raise UserError(f"eval.metrics: {name} with detector {detector.name} is called {right}")
        read = measured_with(cfg)
        moments, images = read["reference"], REAL / cfg.eval.reference / "manifest.json"
        geometry = Geometry(cfg.eval.geometry)
        engine = Engine(detector, geometry, FEATURES, cfg.eval.batch)
        reference = engine.reference(images if NEEDS_IMAGES & set(cfg.eval.metrics) else moments)
        names = {
            "protocol": spoken(cfg.eval), "geometry": geometry.name,
            "detector": describe(read["detector"]),
            "reference": f"{describe(moments)} ({reference.about['images'] or 'unknown number of'} images)",
            "images": cfg.eval.images, "draws": cfg.eval.draws, "labels": cfg.eval.labels,
            "rounding": cfg.eval.rounding, "covariance_init": cfg.eval.covariance_init,
        }  # fmt: skip
        return Protocol(cfg, detector, reference, names)

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
        )

    def fill(self, sample: Sample, identity: dict[str, Any], scratch: Path, part: int) -> None:
        """Put the features that fall to job `part` of ``eval.shards`` into `scratch`, for `measure` to find there."""
        spec = self.cfg.eval
        rows = share(spec.images, part, spec.shards)
        for first in self._firsts():
            source = self._source(sample, identity, first)
            extract(source, WithBrightness(self.detector), scratch, rows, batch=spec.batch)

    def _firsts(self) -> range:
        """First sample seed of every draw."""
        return range(0, self.cfg.eval.draws * self.cfg.eval.images, self.cfg.eval.images)

    def _source(self, sample: Sample, identity: dict[str, Any], first: int) -> Sampled:
        spec = self.cfg.eval

        def images(indices: list[int]) -> Tensor:
            return quantise(sample([first + i for i in indices]), spec.rounding)

        about = {**identity, "first": first, "rounding": spec.rounding, "labels": spec.labels}
        return Sampled(digest_of(about), spec.images, images, Geometry(spec.geometry))

    def _draw(self, sample: Sample, identity: dict[str, Any], scratch: Path, first: int) -> Measured:
        spec, source = self.cfg.eval, self._source(sample, identity, first)
        joined = join(extract(source, WithBrightness(self.detector), scratch, batch=spec.batch), spec.images)
        brightness, features = joined.features[:, -1], np.ascontiguousarray(joined.features[:, :-1])
        drawn = FeatureSet(features, joined.logits, joined.pixels, joined.source, account(self.detector))
        labels = sample_labels(list(range(first, first + spec.images)), self.cfg.data.classes, spec.labels)
        # Only labels that are fixed beforehand are strata: with random ones their numbers vary, too.
        strata = labels if spec.labels == "cyclic" else None
        frechet, influence = self.reference.frechet.measured(features, strata)
        found: dict[str, Estimate] = {}
        for name in spec.metrics:
            if KNOWN[name] == "fd":
                found[name] = frechet
            elif name == "brightness":
                found[name] = mean_estimate(brightness, strata)
            elif name == "accuracy":
                found |= METRICS[name](drawn, self.reference, labels)
            else:
                values = METRICS[KNOWN[name]](drawn, self.reference, strata)
                found |= {key.split()[0].lower() if len(values) > 1 else name: e for key, e in values.items()}
        if ranks := ranks_of(spec.covariance_init):
            (quirk,) = (estimate.value for estimate in from_ones(drawn, self.reference, ranks).values())
            found |= {name: replace(found[name], value=quirk) for name in ("fd", "fid") if name in found}
        return Measured(found, influence)


def spoken(spec: Eval) -> str | None:
    """Name of the protocol and what was changed of it: ``coco10k, but images 2000``."""
    if spec.protocol is None:
        return None
    protocol = named(spec.protocol)
    wanted = protocol.for_a_base()
    return protocol.title({key: getattr(spec, key) for key in wanted if getattr(spec, key) != wanted[key]})


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


def save_influence(path: Path, influence: dict[int, np.ndarray]) -> list[dict[str, Any]]:
    """Write influences by step, as the files of a manifest."""
    save_shard(path, {f"{step:07d}": torch.from_numpy(psi.astype(np.float32)) for step, psi in influence.items()})
    return listing([path], path.parent)
