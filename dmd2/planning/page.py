"""The page of `python -m dmd2.planning`; every number says if it is computed, measured, published or assumed."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from dmd2.planning.memory import WHOLE, Setup
from dmd2.planning.plan import (
    FRAGMENTED,
    KEPT,
    RESERVE,
    Disk,
    Plan,
    TablePlan,
    available,
    binary,
    fit,
    real_images,
    snapshots,
)
from dmd2.planning.rates import A100, A100_PEAK, Rate

WIDTH = 118


class Page:
    """Prints a plan; every number says whether it is computed, measured, published or assumed."""

    def __init__(self, gpus: int, setup: Setup = WHOLE) -> None:
        self.gpus, self.setup = gpus, setup
        self.console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)

    def head(self, base: str, plan: Plan) -> None:
        """What is planned."""
        cfg, steps = plan.cfg, plan.cfg.train.steps
        name = f"workflow/base/{base}.yaml" if plan.name == base else f"{base}/{plan.name}"
        how = f"batch {cfg.optim.batch}, {cfg.train.precision}"
        if cfg.generator.lora is not None:
            how += f", student of rank {cfg.generator.lora.rank}"
        if cfg.optim.states != "fp32":
            how += f", {cfg.optim.states} states"
        self.console.print(f"{name}: {steps:,} iterations, {how}\n")

    def memory(self, plan: Plan, cards: tuple[float, ...], micro_batch: int) -> None:
        """Networks, the law of memory, and GPUs."""
        memory, batch, parts = plan.memory, plan.cfg.optim.batch, self.setup.parts
        how = f", one of {parts} between which networks are split" if parts > 1 else ""
        how += ", activations recomputed" if self.setup.checkpointing else ""
        grid = _grid(f"Memory of one GPU{how} (computed)", "parameters", "trained", "")
        for name, size in memory.standing.items():
            count, trained = plan.counted.parameters.get(name), plan.counted.trained.get(name)
            grid.add_row(name, f"{count:,}" if count else "", f"{trained:,}" if trained else "", binary(size))
        fixed = memory.at(64) - 64 * memory.per_image
        grid.add_row("gradients, activations, temporaries", "", "", binary(fixed - sum(memory.standing.values())))
        grid.add_row("  + for each image of a forward pass", "", "", binary(memory.per_image))
        self.console.print(grid)
        self.console.print(f"Accumulating gradients over several passes takes {binary(memory.gradients)} more.\n")
        self.console.print(
            f"Fits (assumed: {RESERVE:g} GiB for CUDA, workspaces and NCCL and {FRAGMENTED:.0%} of the rest are lost)"
        )
        share = f"{self.gpus} GPUs, {-(-batch // self.gpus)} images each"
        grid = _grid("GPU", "for tensors", "images per pass", f"GPUs for {batch} in one pass", share)
        for card in cards:
            grid.add_row(*fit(memory, card, batch, self.gpus, micro_batch, parts))
        self.console.print(grid)
        self.console.print(
            "micro_batch, shard and checkpointing belong under `training` in the cluster file (workflow/cluster)."
        )
        if plan.cfg.data.latents:
            self.console.print(
                "Prompts and latents are encoded before; the autoencoder that decodes them is not in it."
            )
        self.console.print("")

    def time(self, plan: Plan) -> None:
        """The rate and the hours of one run and of what it needs."""
        rate, cfg, unit = plan.rate, plan.cfg, plan.rate.unit
        many = self._processes(rate)
        used = f", {rate.flops / A100_PEAK:.0%} of its bf16 peak" if rate.device == A100 else ""
        self.console.print(f"Time ({rate.source}:")
        self.console.print(f"{rate.flops / 1e12:.3g} TFLOP/s on each {unit}{used})")
        work = plan.flops * cfg.optim.batch
        seconds = work / rate.flops / many
        self.console.print(
            f"{work / 1e12:.3g} TFLOP per iteration (computed), {seconds:.3g} s on {many} {unit}{'s' * (many > 1)}"
        )
        images, steps = cfg.eval.images, cfg.generator.steps
        grid = _grid("", f"{unit} time", f"on {many}")
        parts = {"training": plan.training()}
        parts[f"{snapshots(cfg)} snapshots x {images:,} images, {steps} step{'s' * (steps > 1)}"] = plan.evaluation()
        if cfg.needs_pairs:
            pairs = cfg.regression.pairs
            parts[f"{pairs.count:,} pairs x {pairs.sampler.network_calls} calls, once"] = plan.pairs()
        if cfg.eval.teacher_samplers:
            each = " + ".join(str(spec.network_calls) for spec in cfg.eval.teacher_samplers.values())
            parts[f"teacher's images, {images:,} x ({each}) calls, once"] = plan.teachers()
        for name, hours in parts.items():
            grid.add_row(name, _hours(hours), _hours(hours / many))
        self.console.print(grid)
        self.console.print("Assumed: GPUs scale perfectly, sampling is as fast as training; detectors are not in it.\n")

    def disk(self, plan: Plan) -> None:
        """What is written."""
        disk, cfg = Disk.of(plan.cfg, plan.counted), plan.cfg
        grid = _grid("Disk (computed)", "")
        grid.add_row(f"{snapshots(cfg)} snapshots of a run", decimal(disk.snapshots))
        grid.add_row(
            f"{KEPT} checkpoints of a run ({decimal(disk.checkpoint)} each), and one being written",
            decimal((KEPT + 1) * disk.checkpoint),
        )
        if disk.features:
            grid.add_row("features of its images, until they are measured", decimal(disk.features))
        if disk.pairs:
            grid.add_row(f"{cfg.regression.pairs.count:,} pairs, shared", decimal(disk.pairs))
        if disk.real is not None:
            grid.add_row(f"{real_images(cfg):,} real images, shared", decimal(disk.real))
        self.console.print(grid)

    def table(self, plan: TablePlan, card: float | None = None, micro_batch: int = 0) -> list[str]:
        """All runs of a table, and their sum; returns those that GPUs of `card` GiB cannot train."""
        seeds, rate = plan.seeds, plan.rows[0].rate
        unit, many = rate.unit, self._processes(rate)
        self.console.print(f"\nTable {plan.name}: {len(plan.rows)} rows x {seeds} seed{'s' * (seeds > 1)}")
        grid = _grid("one run", "memory", "s/iteration", f"{unit} time", f"on {many}", "snapshots", "rate")
        if card is not None:
            grid.add_column(f"on {card:g} GiB")
        small: list[str] = []
        for row in plan.rows:
            batch = row.cfg.optim.batch
            peak = row.counted.iteration(-(-batch // self.gpus)).peak
            seconds = row.flops * batch / row.rate.flops / many
            hours, written = row.training(), Disk.of(row.cfg, row.counted).snapshots
            grid.add_row(
                row.name, binary(peak), f"{seconds:.3g}", _hours(hours), _hours(hours / many),
                decimal(written), row.rate.kind,
                *([] if card is None else [self._fits(row, peak, card, micro_batch, small)]),
            )  # fmt: skip
        self.console.print(grid)
        work = plan.hours()
        told = " + ".join(f"{_hours(value)} {name}" for name, value in work.items() if value)
        total = sum(work.values())
        self.console.print(f"All seeds: {told} = {_hours(total)} of one {unit},")
        self.console.print(
            f"{_hours(total / many)} on {many}; {decimal(plan.bytes())} on disk, checkpoints not pruned."
        )
        return small

    def _fits(self, row: Plan, peak: int, card: float, micro_batch: int, small: list[str]) -> str:
        """Whether a row fits, in which passes, as words; one that does not is added to `small`."""
        if peak <= available(card) and not micro_batch:
            return "fits"
        how = fit(row.memory, card, row.cfg.optim.batch, self.gpus, micro_batch, self.setup.parts)[-1]
        if "does not fit" in how:
            small.append(row.name)
            return "DOES NOT FIT"
        return how.partition(":")[0]

    def _processes(self, rate: Rate) -> int:
        """A rate of CPUs says nothing of several GPUs."""
        return self.gpus if rate.unit == "GPU" else 1


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


def decimal(size: float) -> str:
    """Bytes on disk, in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
