"""The page that `python -m dmd2.plan` prints; every number says if it is computed, measured, published or assumed."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from dmd2.plan import FRAGMENTED, GIB, KEPT, RESERVE, Disk, Plan, TablePlan, calls, fit, real_images, snapshots
from dmd2.rates import A100, A100_PEAK

GB = 1e9  # bytes
WIDTH = 118


class Page:
    """Prints a plan; every number says whether it is computed, measured, published or assumed."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)

    def head(self, base: str, plan: Plan) -> None:
        """What is planned."""
        cfg, steps = plan.cfg, plan.cfg.train.steps
        name = f"workflow/base/{base}.yaml" if plan.name == base else f"{base}/{plan.name}"
        how = f"batch {cfg.optim.batch}, {cfg.train.precision}"
        self.console.print(f"{name}: {steps:,} iterations, {how}; GiB is 2^30 bytes, GB 10^9\n")

    def memory(self, plan: Plan, cards: tuple[float, ...], micro_batch: int) -> None:
        """Networks, the law of memory, and GPUs."""
        memory, batch = plan.memory, plan.cfg.optim.batch
        grid = _grid("Memory of one GPU (computed)", "parameters", "GiB")
        for name, size in memory.standing.items():
            count = plan.counted.parameters.get(name)
            grid.add_row(name, f"{count:,}" if count else "", f"{size / GIB:.2f}")
        fixed = memory.at(64) - 64 * memory.per_image
        grid.add_row("gradients, activations, temporaries", "", f"{(fixed - sum(memory.standing.values())) / GIB:.2f}")
        grid.add_row("  + for each image of a forward pass", "", f"{memory.per_image / GIB:.2f}")
        self.console.print(grid)
        self.console.print(f"Accumulating gradients over several passes takes {memory.gradients / GIB:.2f} GiB more.\n")
        self.console.print(
            f"Fits (assumed: {RESERVE:g} GiB for CUDA, workspaces and NCCL and {FRAGMENTED:.0%} of the rest are lost)"
        )
        share = f"{self.gpus} GPUs, {-(-batch // self.gpus)} images each"
        grid = _grid("GPU, GiB", "for tensors", "images per pass", f"GPUs for {batch} in one pass", share)
        for card in cards:
            cells = fit(memory, card, batch, self.gpus, micro_batch)
            grid.add_row(*([*cells[:2], "0", "none", cells[2]] if len(cells) == 3 else cells))
        self.console.print(grid)
        self.console.print("micro_batch belongs under `training` in the cluster file (workflow/cluster).\n")

    def time(self, plan: Plan) -> None:
        """The rate and the hours of one run and of what it needs."""
        rate, cfg, unit = plan.rate, plan.cfg, plan.rate.unit
        used = f", {rate.flops / A100_PEAK:.0%} of its bf16 peak" if rate.device == A100 else ""
        self.console.print(f"Time ({rate.source}:")
        self.console.print(f"{rate.flops / 1e12:.3g} TFLOP/s on each {unit}{used})")
        work = plan.flops * cfg.optim.batch
        seconds = work / rate.flops / self.gpus
        self.console.print(f"{work / 1e12:.3g} TFLOP per iteration (computed), {seconds:.3g} s on {self.gpus} {unit}s")
        images, steps = cfg.eval.images, cfg.generator.steps
        grid = _grid("", f"{unit}-hours", f"hours on {self.gpus}")
        parts = {"training": plan.training()}
        parts[f"{snapshots(cfg)} snapshots x {images:,} images, {steps} step{'s' * (steps > 1)}"] = plan.evaluation()
        if cfg.needs_pairs:
            pairs = cfg.regression.pairs
            parts[f"{pairs.count:,} pairs x {calls(pairs.sampler)} calls, once"] = plan.pairs()
        if cfg.eval.teacher_samplers:
            many = " + ".join(str(calls(spec)) for spec in cfg.eval.teacher_samplers.values())
            parts[f"teacher's images, {images:,} x {many} calls, once"] = plan.teachers()
        for name, hours in parts.items():
            grid.add_row(name, _hours(hours), _hours(hours / self.gpus))
        self.console.print(grid)
        self.console.print("Assumed: GPUs scale perfectly, sampling is as fast as training; detectors are not in it.\n")

    def disk(self, plan: Plan) -> None:
        """What is written, and what a process reads into memory."""
        disk, cfg = Disk.of(plan.cfg, plan.counted), plan.cfg
        grid = _grid("Disk (computed)", "GB")
        grid.add_row(f"{snapshots(cfg)} snapshots of a run", f"{disk.snapshots / GB:.2f}")
        grid.add_row(
            f"{KEPT} checkpoints of a run ({disk.checkpoint / GB:.2f} each), and one being written",
            f"{(KEPT + 1) * disk.checkpoint / GB:.2f}",
        )
        if disk.pairs:
            grid.add_row(f"{cfg.regression.pairs.count:,} pairs, shared", f"{disk.pairs / GB:.2f}")
        if disk.real is not None:
            grid.add_row(f"{real_images(cfg):,} real images, shared", f"{disk.real / GB:.2f}")
        self.console.print(grid)
        if disk.real is not None and cfg.needs_real:
            self.console.print(f"Each process reads the real images into host memory: {disk.real / GIB:.1f} GiB.")

    def table(self, plan: TablePlan) -> None:
        """All runs of a table, and their sum."""
        seeds, unit = plan.seeds, plan.rows[0].rate.unit
        title = f"\n{plan.name}: {len(plan.rows)} rows x {seeds} seed{'s' * (seeds > 1)}"
        grid = _grid(title, f"GiB on {self.gpus}", "s/iteration", f"{unit}-hours", "hours", "snapshots, GB", "rate")
        for row in plan.rows:
            batch = row.cfg.optim.batch
            peak = row.counted.iteration(-(-batch // self.gpus)).peak
            seconds = row.flops * batch / row.rate.flops / self.gpus
            hours, written = row.training(), Disk.of(row.cfg, row.counted).snapshots
            grid.add_row(
                row.name, f"{peak / GIB:.1f}", f"{seconds:.3g}", _hours(hours), _hours(hours / self.gpus),
                f"{written / GB:.2f}", row.rate.source.split(":")[0],
            )  # fmt: skip
        self.console.print(grid)
        work = plan.hours()
        told = " + ".join(f"{_hours(value)} {name}" for name, value in work.items() if value)
        total = sum(work.values())
        self.console.print(f"All seeds: {told} = {_hours(total)} {unit}-hours, {total / self.gpus / 24:.1f} days on")
        self.console.print(f"{self.gpus} {unit}s; {plan.bytes() / GB:.1f} GB on disk, checkpoints not pruned.")


def _grid(title: str, *columns: str) -> Grid:
    grid = Grid(title, *columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    return grid


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
