"""The page of `python -m dmd2.planning`; every number says if it is computed, measured, published or assumed."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from dmd2.experiment.cluster import Cluster
from dmd2.planning.memory import Memory
from dmd2.planning.plan import KEPT, Plan, TablePlan, host_memory, real_images, requested_memory, snapshots
from dmd2.planning.rates import A100, A100_PEAK, Rate

WIDTH = 118
GIB, MB = 2.0**30, 10**6  # bytes; Slurm's MB are 2^20, which leaves a little over
CARDS = (24.0, 40.0, 80.0)  # GiB
RESERVE, FRAGMENTED = 2.0, 0.1  # GiB of CUDA's context, workspaces and NCCL; share of the rest that fragments


class Page:
    """Prints what runs take on a number of GPUs."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        width = None if sys.stdout.isatty() else WIDTH
        self.print = Console(markup=False, highlight=False, emoji=False, width=width).print

    def head(self, base: str, plan: Plan) -> None:
        """What is planned."""
        cfg = plan.cfg
        name = f"workflow/base/{base}.yaml" if plan.name == base else f"{base}/{plan.name}"
        how = f"batch {cfg.optim.batch}, {cfg.train.precision}"
        if cfg.generator.lora is not None:
            how += f", student of rank {cfg.generator.lora.rank}"
        if cfg.optim.states != "fp32":
            how += f", {cfg.optim.states} states"
        self.print(f"{name}: {cfg.train.steps:,} iterations, {how}\n")

    def memory(self, plan: Plan, cards: tuple[float, ...], micro_batch: int) -> None:
        """Networks, the law of memory, and GPUs."""
        memory, counted, setup, batch = plan.memory, plan.counted, plan.counted.setup, plan.cfg.optim.batch
        how = f", one of {setup.parts} between which networks are split" if setup.parts > 1 else ""
        how += ", activations recomputed" if setup.checkpointing else ""
        grid = _grid(f"Memory of one GPU{how} (computed)", "parameters", "trained", "")
        for name, size in memory.standing.items():
            counts = [found.get(name) for found in (counted.parameters, counted.trained)]
            grid.add_row(name, *(f"{count:,}" if count else "" for count in counts), binary(size))
        fixed = memory.at(64) - 64 * memory.per_image
        grid.add_row("gradients, activations, temporaries", "", "", binary(fixed - sum(memory.standing.values())))
        grid.add_row("  + for each image of a forward pass", "", "", binary(memory.per_image))
        self.print(grid)
        self.print(f"Accumulating gradients over several passes takes {binary(memory.gradients)} more.\n")
        lost = f"{RESERVE:g} GiB for CUDA, workspaces and NCCL and {FRAGMENTED:.0%} of the rest are lost"
        self.print(f"Fits (assumed: {lost})")
        share = f"{self.gpus} GPUs, {-(-batch // self.gpus)} images each"
        grid = _grid("GPU", "for tensors", "images per pass", f"GPUs for {batch} in one pass", share)
        for card in cards:
            grid.add_row(*fit(memory, card, batch, self.gpus, micro_batch, setup.parts))
        self.print(grid)
        self.print(
            "micro_batch, shard and checkpointing belong under `training` in the cluster file (workflow/cluster)."
        )
        if plan.cfg.data.latents:
            self.print("Prompts and latents are encoded before; the autoencoder that decodes them is not in it.")
        self.print("")

    def time(self, plan: Plan) -> None:
        """The rate and the hours of one run and of what it needs."""
        rate, cfg, many = plan.rate, plan.cfg, self._processes(plan.rate)
        used = f", {rate.flops / A100_PEAK:.0%} of its bf16 peak" if rate.device == A100 else ""
        self.print(f"Time ({rate.source}:\n{rate.flops / 1e12:.3g} TFLOP/s on each {rate.unit}{used})")
        work = plan.iteration_flops
        took = f"{work / rate.flops / many:.3g} s on {many} {rate.unit}{'s' * (many > 1)}"
        self.print(f"{work / 1e12:.3g} TFLOP per iteration (computed), {took}")
        images, steps, pairs = cfg.eval.images, cfg.generator.steps, cfg.regression.pairs
        each = " + ".join(str(spec.network_calls) for spec in cfg.eval.teacher_samplers.values())
        told = {
            "training": "training",
            "snapshots' images": f"{snapshots(cfg)} snapshots x {images:,} images, {steps} step{'s' * (steps > 1)}",
            "pairs": f"{pairs.count:,} pairs x {pairs.sampler.network_calls} calls, once",
            "teacher's images": f"teacher's images, {images:,} x ({each}) calls, once",
        }
        grid = _grid("", f"{rate.unit} time", f"on {many}")
        for name, hours in plan.hours().items():
            if hours:
                grid.add_row(told[name], _hours(hours), _hours(hours / many))
        self.print(grid)
        self.print("Assumed: GPUs scale perfectly, sampling is as fast as training; detectors are not in it.\n")

    def disk(self, plan: Plan) -> None:
        """What is written."""
        disk, cfg = plan.disk, plan.cfg
        checkpoints = f"{KEPT} checkpoints of a run ({decimal(disk.checkpoint)} each), and one being written"
        sizes = {
            f"{snapshots(cfg)} snapshots of a run": disk.snapshots,
            checkpoints: (KEPT + 1) * disk.checkpoint,
            "features of its images, until they are measured": disk.features,
            f"{cfg.regression.pairs.count:,} pairs, shared": disk.pairs,
            f"{real_images(cfg) or 0:,} real images, shared": disk.real,
        }
        grid = _grid("Disk (computed)", "")
        for name, size in sizes.items():
            if size:
                grid.add_row(name, decimal(size))
        self.print(grid)

    def host(self, plan: Plan, cluster: Cluster, name: str) -> None:
        """The memory of a node of a cluster file, and whether it asks for enough."""
        share = -(-plan.cfg.optim.batch // (cluster.processes * cluster.training.nodes))
        peak = plan.memory.at(min(share, cluster.training.micro_batch or share), accumulated=True)
        processes, saving = host_memory(plan.counted, cluster, peak)
        need, has = -(-round(processes + saving) // MB), requested_memory(cluster)
        self.print(
            f"Host memory of a node, {cluster.processes} process{'es' * (cluster.processes > 1)} (workflow/cluster/"
            f"{name}.yaml): {processes / MB:,.0f} MB for processes (assumed, of a GPU) + {saving / MB:,.0f} MB to save "
            "(computed); mapped files not counted."
        )
        if has is not None and has < need:
            self.print(f"Too small: jobs.train asks for {has} MB of memory of a node; set mem_mb to {need} or more.")

    def table(self, plan: TablePlan, card: float | None = None, micro_batch: int = 0) -> list[str]:
        """All runs of a table, and their sum; returns those that GPUs of `card` GiB cannot train."""
        seeds, unit, many = plan.seeds, plan.rows[0].rate.unit, self._processes(plan.rows[0].rate)
        self.print(f"\nTable {plan.name}: {len(plan.rows)} rows x {seeds} seed{'s' * (seeds > 1)}")
        grid = _grid("one run", "memory", "s/iteration", f"{unit} time", f"on {many}", "snapshots", "rate")
        if card is not None:
            grid.add_column(f"on {card:g} GiB")
        small: list[str] = []
        for row in plan.rows:
            peak = row.counted.iteration(-(-row.cfg.optim.batch // self.gpus)).peak
            seconds, hours = row.iteration_flops / row.rate.flops / many, row.hours()["training"]
            times = (f"{seconds:.3g}", _hours(hours), _hours(hours / many))
            cells = [row.name, binary(peak), *times, decimal(row.disk.snapshots), row.rate.kind]
            if card is not None:
                cells.append(fits := self._fits(row, peak, card, micro_batch))
                small += [row.name] if fits == "DOES NOT FIT" else []
            grid.add_row(*cells)
        self.print(grid)
        work = plan.hours()
        told, total = " + ".join(f"{_hours(value)} {name}" for name, value in work.items() if value), sum(work.values())
        self.print(f"All seeds: {told} = {_hours(total)} of one {unit},")
        self.print(f"{_hours(total / many)} on {many}; {decimal(plan.bytes())} on disk, checkpoints not pruned.")
        return small

    def _fits(self, row: Plan, peak: int, card: float, micro_batch: int) -> str:
        """Whether a row fits, and in which passes."""
        if peak <= available(card) and not micro_batch:
            return "fits"
        how = fit(row.memory, card, row.cfg.optim.batch, self.gpus, micro_batch, row.counted.setup.parts)[-1]
        return "DOES NOT FIT" if "does not fit" in how else how.partition(":")[0]

    def _processes(self, rate: Rate) -> int:
        """A rate of CPUs says nothing of several GPUs."""
        return self.gpus if rate.unit == "GPU" else 1


def available(card: float) -> float:
    """Bytes of a GPU of `card` GiB that tensors can take."""
    return (card - RESERVE) * (1 - FRAGMENTED) * GIB


def fit(memory: Memory, card: float, batch: int, gpus: int, micro_batch: int = 0, fewest: int = 1) -> list[str]:
    """What GPUs of `card` GiB can do, as cells of the table.

    The card; what of it tensors can take; the most images of a pass; the GPUs, `fewest` or more, that need no
    accumulation; how a batch is done on `gpus` of them, in passes of `micro_batch` images or of as many as fit.
    """
    room, share = available(card), -(-batch // gpus)
    alone = next((n for n in range(fewest, batch + 1) if memory.at(-(-batch // n)) <= room), None)
    images = min(micro_batch or memory.largest(room, share) or 1, share)
    passes = -(-share // images)
    need = memory.at(images, accumulated=passes > 1)
    how = "one pass" if passes == 1 else f"{passes} passes, micro_batch {images}"
    missing = f": does not fit, {binary(need - room)} more is needed" if need > room else f": {binary(need)}"
    return [f"{card:g} GiB", binary(room), f"{memory.largest(room, batch)}", f"{alone or 'none'}", how + missing]


def _grid(title: str, *columns: str) -> Grid:
    grid = Grid(title, *columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    return grid


def _hours(hours: float) -> str:
    """``43 days``, ``46 h``, ``7.8 min``."""
    if hours >= 1:
        return f"{hours / 24:,.0f} days" if hours >= 1000 else f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def binary(size: float) -> str:
    """Bytes of memory, in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def decimal(size: float) -> str:
    """Bytes on disk, in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
