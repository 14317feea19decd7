"""What a base, a row or a table will take, before anything is submitted: hours, disk, and memory of a node.

Nothing of full size is allocated, and no data, teacher or GPU is needed (see dmd2/planning/memory.py).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dmd2.core.files import read_json
from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import RunConfig, TrainConfig, digest
from dmd2.experiment.method_config import Lora
from dmd2.experiment.run_inputs import REAL
from dmd2.planning.memory import WHOLE, Counted, Memory, Setup
from dmd2.planning.rates import Rate, rate_of
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.checkpoints.thread import LARGEST

FLOAT, HALF = 4, 2  # bytes
STORED = {"text": 2, "pooled": 2, "time_ids": 4, "labels": 8}  # bytes of an element, as sets and pairs keep it
FEATURES = {"inception": 2048, "dinov2-vitl14": 1024, "-classifier": 64}
# Training images, where no manifest says so.
PUBLISHED_IMAGES = {"imagenet64": 1_281_167, "cifar10": 50_000, "fashion": 60_000, "digits": 1_797}
KEPT = Checkpoints(Path()).keep
SAVED = ("student", "critic", "head", "EMA")  # networks of a checkpoint
SHORT = 1e-3  # seconds; an iteration starts some thousand kernels, each in some microseconds
GPU_PROCESS, CPU_PROCESS = 3 * 2**30, 2**30  # bytes; interpreter and libraries, with those of CUDA or without


Counting = Callable[[TrainConfig], Counted]


def counting(setup: Setup = WHOLE) -> Counting:
    """A function that counts the networks of a run on the meta device, those of equal configs once."""
    known: dict[str, Counted] = {}

    def counted(cfg: TrainConfig) -> Counted:
        key = digest(cfg)
        if key not in known:
            known[key] = Counted(cfg, setup)
        return known[key]

    return counted


def varied(cfg: RunConfig, lora: int, states: str | None) -> RunConfig:
    """The run with low-rank factors of that rank, and with those states of AdamW."""
    if lora:
        generator = cfg.generator.model_copy(update={"lora": Lora(rank=lora, alpha=float(lora))})
        cfg = cfg.model_copy(update={"generator": generator})
    return cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"states": states})}) if states else cfg


class Disk(NamedTuple):
    """Bytes that a run writes (all its snapshots, one checkpoint, features of its images) and that it shares."""

    snapshots: int
    checkpoint: int
    features: int
    pairs: int
    real: int | None  # None where the number of images is unknown


def disk_of(cfg: RunConfig, counted: Counted) -> Disk:
    """Bytes on disk of a run: float32, but real images are uint8, and latents and text states float16."""
    pixels = cfg.data.channels * cfg.data.resolution**2
    found = vars(counted.condition(counted.models.teacher, 1)).items()
    condition = sum(value.numel() * STORED[name] for name, value in found if value is not None)
    count = real_images(cfg)
    return Disk(
        snapshots=snapshots(cfg) * counted.parameters["student"] * FLOAT,
        checkpoint=saved_bytes(counted) + sum(tensor.nbytes for tensor in counted.states),
        features=snapshots(cfg) * cfg.eval.images * cfg.eval.draws * _features(cfg.eval.detector) * FLOAT,
        pairs=cfg.pairs.count * (2 * pixels * FLOAT + condition) if cfg.needs_pairs else 0,
        real=None if count is None else count * (pixels * (HALF if cfg.data.latents else 1) + condition),
    )


def saved_bytes(counted: Counted) -> int:
    """Bytes of the weights in a checkpoint."""
    return sum(counted.parameters.get(name, 0) for name in SAVED) * FLOAT


def copied_bytes(counted: Counted, on_gpu: bool) -> int:
    """Bytes of the host's copy of a checkpoint; 0 for one so large that it is written without a copy.

    From a GPU it is in pinned memory, which PyTorch hands out in powers of two and keeps.
    """
    weights = [p for name in SAVED if name in counted.modules for p in counted.modules[name].parameters()]
    sizes = [tensor.nbytes for tensor in (*weights, *counted.states)]
    if sum(sizes) > LARGEST:
        return 0
    return sum(1 << (size - 1).bit_length() if on_gpu else size for size in sizes)


def _features(detector: str) -> int:
    """Number of features of one image; 0 for a detector that is not known here."""
    if found := re.fullmatch(r"lite0-(\d+)@\d+", detector):
        return int(found[1])
    return next((count for start, count in FEATURES.items() if start in detector), 0)


def snapshots(cfg: RunConfig) -> int:
    """Snapshots of a run, the last iteration's included."""
    return -(-cfg.train.steps // cfg.train.snapshot_every)


def real_images(cfg: RunConfig) -> int | None:
    """Images of the real set, by its manifest or else by what is published."""
    manifest = REAL / cfg.data.name / "manifest.json"
    if manifest.exists() and (count := read_json(manifest).get("count")) is not None:
        return int(count)
    return PUBLISHED_IMAGES.get(cfg.data.name)


def host_memory(counted: Counted, cluster: Cluster, peak: float) -> tuple[float, int]:
    """Bytes of a node for its processes and to save, beyond mapped files, which the system may drop.

    Processes: their libraries (assumed), and on a CPU the tensors, `peak` in each, that a GPU would hold. To save: the
    student's weights for a snapshot and the copy of a checkpoint that a thread writes, in process 0; of split networks
    the weights or, if that is more, the node's rows of a checkpoint in parts.
    """
    job, nodes, count = cluster.jobs.train, cluster.training.nodes, cluster.processes
    on_gpu = job.device == "cuda" or (job.device == "auto" and bool(job.gpu or job.gres))
    saving = counted.parameters["student"] * FLOAT
    if cluster.training.shard and count * nodes > 1:
        saving = max(saving, -(-(saved_bytes(counted) + counted.moments) // nodes))
    else:
        saving += copied_bytes(counted, on_gpu)
    return count * (GPU_PROCESS if on_gpu else CPU_PROCESS + peak), saving


def requested_memory(cluster: Cluster) -> int | None:
    """MB of a node that the cluster file asks for trainings, None where it leaves that to the cluster."""
    job = cluster.jobs.train
    if job.mem_mb_per_cpu is not None and job.mem_mb is None:
        return job.mem_mb_per_cpu * job.threads * cluster.processes
    return job.mem_mb


@dataclass(frozen=True)
class Plan:
    """One run: its config, its networks and its rate."""

    name: str
    cfg: RunConfig
    counted: Counted
    rate: Rate

    @staticmethod
    def of(base: str, run: str, cfg: RunConfig, counted: Counting, rate: Rate | None = None) -> "Plan":
        """Count a run, at `rate` or at the best that is known."""
        return Plan(run, cfg, counted(cfg), rate or rate_of(base, run, cfg, lambda other: counted(other).image_flops))

    @cached_property
    def memory(self) -> Memory:
        """Memory of one process at any micro-batch."""
        return self.counted.memory()

    @cached_property
    def disk(self) -> Disk:
        """Bytes on disk."""
        return disk_of(self.cfg, self.counted)

    @property
    def iteration_flops(self) -> float:
        """Operations of an iteration of all processes."""
        return self.counted.image_flops * self.cfg.optim.batch

    @property
    def launches(self) -> bool:
        """Whether networks are so small that starting kernels, of which no rate is assumed, takes the time."""
        return self.rate.kind == "assumed" and self.iteration_flops / self.rate.flops < SHORT

    def hours(self) -> dict[str, float]:
        """Hours of one process by kind of work; pairs and what is the teacher's are shared, detectors not counted."""
        cfg, images = self.cfg, self.cfg.eval.images * self.cfg.eval.draws
        calls = {
            "snapshots' images": images * snapshots(cfg) * cfg.generator.steps,
            "pairs": cfg.pairs.count * cfg.pairs.sampler.network_calls if cfg.needs_pairs else 0,
            "teacher's images": images * sum(s.network_calls for s in cfg.eval.teacher_samplers.values()),
        }
        work = {"training": self.iteration_flops * cfg.train.steps}
        if (teacher := cfg.teacher.train) is not None:  # a backward pass computes twice as much as a forward pass
            calls["teacher's training"] = 3 * teacher.batch * teacher.steps
        work |= {name: count * self.counted.forward_flops for name, count in calls.items()}
        return {name: self.rate.hours(operations) for name, operations in work.items()}


@dataclass(frozen=True)
class TablePlan:
    """The runs of a table over its seeds, with what they share counted once."""

    name: str
    seeds: int
    rows: list[Plan]

    @property
    def _pair_sets(self) -> list[Plan]:
        """One run for each set of pairs."""
        return list({row.cfg.pair_set: row for row in self.rows if row.cfg.needs_pairs}.values())

    def hours(self) -> dict[str, float]:
        """Hours of one process by kind of work, all seeds together."""
        found = [row.hours() for row in self.rows]
        of_runs = {name: self.seeds * sum(hours[name] for hours in found) for name in ("training", "snapshots' images")}
        pairs = sum(row.hours()["pairs"] for row in self._pair_sets)
        return {**of_runs, "pairs": pairs, **{name: hours for name, hours in found[0].items() if "teacher" in name}}

    def bytes(self) -> int:
        """On disk once all runs are finished, checkpoints not pruned."""
        shared = sum(row.disk.pairs for row in self._pair_sets) + (self.rows[0].disk.real or 0)
        return shared + self.seeds * sum(row.disk.snapshots + KEPT * row.disk.checkpoint for row in self.rows)
