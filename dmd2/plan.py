"""What a base, a row or a table will take, before anything is submitted: memory of a GPU, hours, disk.

Nothing of full size is allocated, and no data, teacher or GPU is needed (see dmd2/memory.py).
"""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import typer

from dmd2.ablations import load_base, load_experiment
from dmd2.checkpoint import Checkpoints
from dmd2.cluster import CLUSTERS, load_cluster
from dmd2.config import Lora, RunConfig, TrainConfig, digest
from dmd2.errors import UserError, readable_errors
from dmd2.eval_config import Sampler
from dmd2.files import read_json
from dmd2.host import Host, condition_bytes, image_bytes, told
from dmd2.inputs import REAL
from dmd2.memory import WHOLE, Counted, Memory, Setup
from dmd2.rates import PUBLISHED_IMAGES, Rate, given, rate_of

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
        """As trainer, pairs and data write them: in float32; real sets and text states as `dmd2.host` says."""
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


def chosen(base: str, run: str | None) -> tuple[str, RunConfig]:
    """A run of a base by its name in any table, or the base itself.

    Raises:
        UserError: there is no such base, or no table has such a run of it.
    """
    _, cfg = load_base(base)
    if run is None:
        return base, cfg
    runs = {name: found for (of, name), found in load_experiment().runs.items() if of == base}
    if run not in runs:
        raise UserError(f"no table has the run {base}/{run}{_hint(run, list(runs), 'runs')}")
    return run, runs[run]


def varied(cfg: RunConfig, lora: int, states: str | None) -> RunConfig:
    """The run with low-rank factors of that rank, and with those states of AdamW."""
    if lora:
        generator = cfg.generator.model_copy(update={"lora": Lora(rank=lora, alpha=float(lora))})
        cfg = cfg.model_copy(update={"generator": generator})
    return cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"states": states})}) if states else cfg


def rows_of(base: str, table: str) -> tuple[int, dict[str, RunConfig]]:
    """Number of seeds and the rows of a table.

    Raises:
        UserError: there is no such table, or it is of another base.
    """
    experiment = load_experiment()
    tables = [name for name, spec in experiment.tables.items() if spec.base == base]
    if table not in experiment.tables:
        raise UserError(f"there is no table {table}{_hint(table, tables, 'tables of ' + base)}")
    if table not in tables:
        raise UserError(f"table {table} is of base {experiment.tables[table].base}, not {base}")
    rows = {row.run: experiment.runs[base, row.run] for row in experiment.rows[table]}
    return len(experiment.tables[table].seeds), rows


def _hint(name: str, known: list[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else f"; {what}: {', '.join(sorted(known)) or 'none'}"


def main(
    base: Annotated[str, typer.Argument(help="file in workflow/base, without .yaml")],
    table: Annotated[str | None, typer.Option(help="also all rows and seeds of a table of that base")] = None,
    run: Annotated[str | None, typer.Option(help="a row, by its name in any table; default: the base itself")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB; default: 24, 40 and 80", min=1)] = None,
    gpus: Annotated[int, typer.Option(help="that share the batch; 0: 8, or the batch if it is less", min=0)] = 0,
    micro_batch: Annotated[int, typer.Option(help="images of one forward pass; 0: as many as fit", min=0)] = 0,
    shard: Annotated[bool, typer.Option("--shard", help="split networks and optimisers over the GPUs")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute activations in backward")] = False,
    lora: Annotated[int, typer.Option(help="rank of a low-rank student; 0: as the base says", min=0)] = 0,
    cluster: Annotated[str | None, typer.Option(help="file in workflow/cluster; default: slurm if it is there")] = None,
    states: Annotated[Literal["fp32", "8bit"] | None, typer.Option(help="of AdamW, instead of the base's")] = None,
    seconds_per_iteration: Annotated[float, typer.Option(help="known rate on these GPUs; 0: look for one", min=0)] = 0,
) -> None:
    """Memory, GPUs, hours and disk of a base, one of its runs, or a table, before anything is submitted."""
    from dmd2.plan_page import Page

    with readable_errors():
        name, cfg = chosen(base, run)
        gpus = gpus or min(8, cfg.optim.batch)
        if gpus > cfg.optim.batch:
            raise UserError(f"--gpus {gpus}: {gpus} processes cannot share a batch of {cfg.optim.batch}")
        cfg = varied(cfg, lora, states)
        seeds, rows = rows_of(base, table) if table else (0, {})
        setup = Setup(gpus if shard else 1, checkpointing)
        counts, rate = Counts(setup), None
        if seconds_per_iteration:
            rate = given(seconds_per_iteration, gpus, counts.flops(cfg) * cfg.optim.batch)
        plan, page = Plan.of(base, name, cfg, counts, rate), Page(gpus, setup)
        page.head(base, plan)
        page.memory(plan, CARDS if gpu_memory is None else (gpu_memory,), micro_batch)
        page.time(plan)
        page.disk(plan)
        if cluster is not None or (CLUSTERS / "slurm.yaml").exists():
            machine = load_cluster(cluster or "slurm")
            share = -(-cfg.optim.batch // (machine.processes * machine.training.nodes))
            peak = plan.memory.at(min(share, machine.training.micro_batch or share), accumulated=True)
            page.console.print(told(Host.of(plan.counted, machine, peak), machine, cluster or "slurm"))
        if table is not None:
            found = TablePlan(table, seeds, [Plan.of(base, *row, counts, rate) for row in rows.items()])
            if small := page.table(found, gpu_memory, micro_batch):
                raise UserError(f"--gpu-memory {gpu_memory:g}: {', '.join(small)} of table {table} does not fit")


if __name__ == "__main__":
    typer.run(main)
