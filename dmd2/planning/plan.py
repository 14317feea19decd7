"""What a base, a row or a table will take, before anything is submitted: memory of a GPU, hours, disk.

Nothing of full size is allocated, and no data, teacher or GPU is needed (see dmd2/planning/memory.py).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dmd2.core.files import read_json
from dmd2.experiment.config import RunConfig, TrainConfig, digest
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.run_inputs import REAL
from dmd2.planning.host_memory import condition_bytes, image_bytes
from dmd2.planning.memory import WHOLE, Counted, Memory, Setup
from dmd2.planning.rates import PUBLISHED_IMAGES, Rate, rate_of
from dmd2.training.checkpoint import Checkpoints

GIB = 2.0**30  # bytes
CARDS = (24.0, 40.0, 80.0)  # GiB
RESERVE, FRAGMENTED = 2.0, 0.1  # GiB of CUDA's context, workspaces and NCCL; share of the rest that fragments
FLOAT = 4  # bytes
FEATURES = {"inception": 2048, "dinov2-vitl14": 1024, "-classifier": 64}
KEPT = Checkpoints(Path()).keep


class Counts:
    """Networks and operations by config; a config is counted once."""

    def __init__(self, setup: Setup = WHOLE) -> None:
        self.setup = setup
        self._counted: dict[str, Counted] = {}
        self._flops: dict[str, float] = {}

    def of(self, cfg: TrainConfig) -> Counted:
        """A run's networks on the meta device."""
        key = digest(cfg)
        if key not in self._counted:
            self._counted[key] = Counted(cfg, self.setup)
        return self._counted[key]

    def flops(self, cfg: TrainConfig) -> float:
        """Operations of one image in one iteration."""
        key = digest(cfg)
        if key not in self._flops:
            self._flops[key] = self.of(cfg).flops()
        return self._flops[key]


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes and that it shares with others."""

    snapshots: int
    checkpoint: int
    features: int
    pairs: int
    real: int | None

    @staticmethod
    def of(cfg: RunConfig, counted: Counted) -> "Disk":
        """As trainer, pairs and data write them: in float32; real sets and text states as `host_memory` says."""
        pixels = cfg.data.channels * cfg.data.resolution**2
        condition = condition_bytes(counted)
        kept = [name for name in ("student", "critic", "head", "EMA") if name in counted.parameters]
        weights = sum(counted.parameters[name] for name in kept)
        pairs = cfg.regression.pairs.count * (2 * pixels * FLOAT + condition) if cfg.needs_pairs else 0
        count = real_images(cfg)
        real = None if count is None else count * (image_bytes(cfg) + condition)
        features = snapshots(cfg) * cfg.eval.images * cfg.eval.draws * _features(cfg.eval.detector) * FLOAT
        student = snapshots(cfg) * counted.parameters["student"] * FLOAT
        states = sum(tensor.nbytes for tensor in counted.states)
        return Disk(student, weights * FLOAT + states, features, pairs, real)

    @property
    def run(self) -> int:
        """Of one run: its snapshots, and the checkpoints it keeps with one more being written."""
        return self.snapshots + (KEPT + 1) * self.checkpoint


def _features(detector: str) -> int:
    """Features of one image, 0 of a detector whose number is not known here."""
    if found := re.fullmatch(r"lite0-(\d+)@\d+", detector):
        return int(found[1])
    return next((count for start, count in FEATURES.items() if start in detector), 0)


def snapshots(cfg: RunConfig) -> int:
    """Snapshots of a run, the last iteration's included."""
    return -(-cfg.train.steps // cfg.train.snapshot_every)


def real_images(cfg: RunConfig) -> int | None:
    """Images of the real set: as its manifest says, else as is known of it."""
    manifest = REAL / cfg.data.name / "manifest.json"
    if manifest.exists() and (count := read_json(manifest).get("count")) is not None:
        return int(count)
    return PUBLISHED_IMAGES.get(cfg.data.name)


def available(card: float) -> float:
    """Bytes of a GPU of `card` GiB that tensors can take."""
    return (card - RESERVE) * (1 - FRAGMENTED) * GIB


@dataclass(frozen=True)
class Plan:
    """One run: its config, its networks and its rate."""

    name: str
    cfg: RunConfig
    counted: Counted
    flops: float
    rate: Rate

    @staticmethod
    def of(base: str, run: str, cfg: RunConfig, counts: Counts, rate: Rate | None = None) -> "Plan":
        """Count a run, at `rate` or at the best that is known."""
        counted, flops = counts.of(cfg), counts.flops(cfg)
        return Plan(run, cfg, counted, flops, rate or rate_of(base, run, cfg, counts.flops))

    @cached_property
    def memory(self) -> Memory:
        """Memory of one process at any micro-batch."""
        return self.counted.memory()

    def training(self) -> float:
        """Hours of one process for the whole training."""
        return self.rate.hours(self.flops * self.cfg.optim.batch * self.cfg.train.steps)

    def evaluation(self) -> float:
        """Hours of one process to sample the images of all snapshots; the detector is not counted."""
        images = self.cfg.eval.images * snapshots(self.cfg) * self.cfg.generator.steps
        return self.rate.hours(images * self.counted.forward_flops())

    def pairs(self) -> float:
        """Hours of one process to make the teacher's pairs."""
        return self._sampled(self.cfg.regression.pairs.count, self.cfg.regression.pairs.sampler)

    def teachers(self) -> float:
        """Hours of one process to sample the teacher's images that tables show."""
        return sum(self._sampled(self.cfg.eval.images, spec) for spec in self.cfg.eval.teacher_samplers.values())

    def _sampled(self, images: int, sampler: Sampler) -> float:
        return self.rate.hours(images * sampler.network_calls * self.counted.forward_flops())


def binary(size: float) -> str:
    """Bytes of memory, in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def fit(memory: Memory, card: float, batch: int, gpus: int, micro_batch: int = 0, fewest: int = 1) -> list[str]:
    """What GPUs of `card` GiB can do, as cells of the table.

    The card; what of it tensors can take; the most images of a pass; the GPUs, `fewest` or more, that need no
    accumulation; how a batch is done on `gpus` of them, in passes of `micro_batch` images or of as many as fit.
    """
    room, share = available(card), -(-batch // gpus)
    cells = [f"{card:g} GiB", binary(room)]
    largest = memory.largest(room, share)
    alone = next((n for n in range(fewest, batch + 1) if memory.at(-(-batch // n)) <= room), None)
    images = min(micro_batch or largest or 1, share)
    passes = -(-share // images)
    need = memory.at(images, accumulated=passes > 1)
    how = "one pass" if passes == 1 else f"{passes} passes, micro_batch {images}"
    missing = f": does not fit, {binary(need - room)} more is needed" if need > room else f": {binary(need)}"
    return [*cells, f"{memory.largest(room, batch)}", f"{alone or 'none'}", how + missing]


@dataclass(frozen=True)
class TablePlan:
    """The runs of a table over its seeds, with what they share counted once."""

    name: str
    seeds: int
    rows: list[Plan]

    def hours(self) -> dict[str, float]:
        """Hours of one process by kind of work, all seeds together."""
        sets = {row.cfg.pair_set: row for row in self.rows if row.cfg.needs_pairs}
        return {
            "training": self.seeds * sum(row.training() for row in self.rows),
            "snapshots' images": self.seeds * sum(row.evaluation() for row in self.rows),
            "pairs": sum(row.pairs() for row in sets.values()),
            "teacher's images": self.rows[0].teachers(),
        }

    def bytes(self) -> int:
        """On disk once all runs are finished, checkpoints not pruned."""
        sets = {row.cfg.pair_set: row for row in self.rows if row.cfg.needs_pairs}
        disks = [Disk.of(row.cfg, row.counted) for row in self.rows]
        shared = sum(Disk.of(row.cfg, row.counted).pairs for row in sets.values()) + (disks[0].real or 0)
        return shared + self.seeds * sum(disk.snapshots + KEPT * disk.checkpoint for disk in disks)
