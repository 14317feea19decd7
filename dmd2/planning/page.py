"""The page of `dmd2 plan`; every number says if it is computed, measured, published or assumed."""

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
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


def plan_page(
    base: str, plan: Plan, gpus: int, cards: Iterable[float], micro_batch: int, cluster: tuple[str, Cluster] | None
) -> str:
    """The page of a run on `gpus` GPUs of each size in `cards` (GiB) and on the hosts of a named cluster file."""
    return _rendered(
        "plan.txt.j2",
        name=f"workflow/base/{base}.yaml" if plan.name == base else f"{base}/{plan.name}",
        plan=plan,
        setup=plan.counted.setup,
        gpus=gpus,
        cards=cards,
        micro_batch=micro_batch,
        many=_processes(plan.rate, gpus),
        snapshots=snapshots(plan.cfg),
        real_images=real_images(plan.cfg),
        host=cluster and host(plan, *cluster),
    )


def table_page(table: TablePlan, gpus: int, card: float | None, micro_batch: int) -> tuple[str, list[str]]:
    """All runs of a table, and their sum; and the names of those that GPUs of `card` GiB cannot train."""
    peaks = {row.name: row.counted.iteration(-(-row.cfg.optim.batch // gpus)).peak for row in table.rows}
    fits: dict[str, str] = {}
    for row in table.rows:
        if card is None or (peaks[row.name] <= available(card) and not micro_batch):
            fits[row.name] = "fits"
        else:
            how = fit(row.memory, card, row.cfg.optim.batch, gpus, micro_batch, row.counted.setup.parts)[-1]
            fits[row.name] = "DOES NOT FIT" if "does not fit" in how else how.partition(":")[0]
    rate = table.rows[0].rate
    many = _processes(rate, gpus)
    text = _rendered("table.txt.j2", table=table, peaks=peaks, fits=fits, card=card, unit=rate.unit, many=many)
    return text, [name for name, how in fits.items() if how == "DOES NOT FIT"]


def show(text: str) -> None:
    """Print a page, with its long lines broken."""
    width = None if sys.stdout.isatty() else WIDTH
    Console(markup=False, highlight=False, emoji=False, width=width).print(text, end="")


def host(plan: Plan, name: str, cluster: Cluster) -> dict[str, Any]:
    """Bytes of a node for processes and for saving, and the MB that a cluster file needs and asks for."""
    share = -(-plan.cfg.optim.batch // (cluster.processes * cluster.training.nodes))
    peak = plan.memory.at(min(share, cluster.training.micro_batch or share), accumulated=True)
    running, saving = host_memory(plan.counted, cluster, peak)
    told = {"cluster": name, "processes": cluster.processes, "running": running, "saving": saving}
    return {**told, "need": -(-round(running + saving) // MB), "has": requested_memory(cluster)}


def _processes(rate: Rate, gpus: int) -> int:
    """Number of processes that share the hours; a rate measured on a CPU says nothing about several GPUs."""
    return gpus if rate.unit == "GPU" else 1


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


def _grid(text: str) -> str:
    """Lines of cells with | between them, the head first, as aligned columns, all but the first to the right."""
    lines = [line.split("|") for line in text.splitlines() if line.strip()]
    head, *rows = ([first.rstrip(), *(cell.strip() for cell in others)] for first, *others in lines)
    grid = Grid(*head, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in rows:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), markup=False, highlight=False, emoji=False, width=WIDTH)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def _hours(hours: float) -> str:
    """``43 days``, ``46 h``, ``7.8 min``."""
    if hours >= 1:
        return f"{hours / 24:,.0f} days" if hours >= 1000 else f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def binary(size: float) -> str:
    """Bytes of memory, in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _decimal(size: float) -> str:
    """Bytes on disk, in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _rendered(file: str, **values: Any) -> str:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    pages = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.keep_trailing_newline = True
    pages.filters |= {
        "binary": binary,
        "count": lambda number: f"{number:,}" if number else "",
        "decimal": _decimal,
        "grid": _grid,
        "hours": _hours,
        "tera": lambda number: f"{number / 1e12:.3g}",
    }
    constants = {"a100": A100, "a100_peak": A100_PEAK, "fragmented": FRAGMENTED, "kept": KEPT, "reserve": RESERVE}
    pages.globals |= {**constants, "fit": fit, "mb": MB}
    return pages.get_template(file).render(values)
