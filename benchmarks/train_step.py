"""A training step beside the official one of DMD2 on ImageNet-64: both in one process on one GPU, in turns.

    git clone https://github.com/tianweiy/DMD2 && git -C DMD2 checkout 8d8fa55
    python -m benchmarks.train_step --official DMD2 --precision bf16,bf16-body --compiled none,network --graphs off,on

Nothing of the official code is in this project: see `benchmarks.official`. Weights are random, and so are real images;
the official ones lie on the GPU, ours come through our own batches. Blocks of one update of the student are taken in
turns, so that clocks and neighbours hit all procedures alike. Ours are one training for each combination of the
options; the present default comes first. Ctrl-C or SIGTERM, as of `timeout`, ends a compilation that takes too long:
those that are ready by then are measured. ``--tiny`` runs all of it with small networks, for a trial on a CPU.
"""

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from benchmarks import official
from benchmarks.device import matrix_rate, name_of_device, runtime_calls, seconds
from benchmarks.random_runs import changed, hardware, random_training, tiny_config
from benchmarks.tables import listed, markdown
from dmd2.core.errors import UserError, readable_errors
from dmd2.core.precision import float32_products
from dmd2.core.run import commit
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import load_base
from dmd2.planning.memory import Counted

Item = TypeVar("Item")
CALLS = ["launches", "kernels", "waits", "to host", "busy, ms"]  # per iteration, by the profiler
HEAD = ["procedure", "ms / iteration (range)", "images / s", "peak, GB", *CALLS,
        "share of the matrix rate"]  # fmt: skip
# The network of `tiny_config`, in its code.
TINY_OFFICIAL = {"augment_dim": 0, "model_channels": 32, "channel_mult": [1, 2], "channel_mult_emb": 4, "num_blocks": 1,
                 "attn_resolutions": [8], "dropout": 0.0, "label_dropout": 0}  # fmt: skip


@dataclass
class Procedure:
    """Something that trains, and what was measured of it.

    standing: bytes that it holds between iterations. peak: most bytes, with those of no other procedure. refused: why
    it does not run. busy: milliseconds of the GPU per iteration, by kernel.
    """

    name: str
    iterate: Callable[[], Any] = lambda: None
    standing: int = 0
    peak: int = 0
    refused: str = ""
    times: list[float] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)


def started(name: str, build: Callable[[], Callable[[], Any]], block: int) -> Procedure:
    """A procedure after its first blocks, which make moments, compile and capture."""
    found, before, began = Procedure(name), allocated(), time.monotonic()
    try:
        found.iterate = build()
        reset_peak()
        for _ in range(2 * block):
            found.iterate()
        found.standing = allocated() - before
        found.peak = peak() - before
    except (UserError, RuntimeError) as error:  # what cannot be compiled or captured must not lose the others
        found.refused = str(error).splitlines()[0]
        found.iterate = lambda: None
    print(f"{name}: {found.refused or 'ready'} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def timed(one: Procedure, block: int) -> None:
    """Time one more block, and look at the peak."""
    before = allocated()
    reset_peak()
    one.times.append(seconds(lambda: [one.iterate() for _ in range(block)]) / block)
    one.peak = max(one.peak, peak() - before + one.standing)


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def row(one: Procedure, batch: int, flops: float, rate: float, first: Procedure) -> list[str]:
    """A line of the table."""
    if one.refused:
        return [one.name, one.refused, *[""] * (len(HEAD) - 1)]
    middle, shown = statistics.median(one.times), torch.cuda.is_available()
    calls = [f"{one.calls[name]:,.0f}" if shown else "-" for name in CALLS]
    ratio = statistics.median(first.times) / middle if first.times else 0
    return [one.name, f"{1000 * middle:.1f} ({1000 * min(one.times):.1f} to {1000 * max(one.times):.1f})",
            f"{batch / middle:.1f}", f"{one.peak / 1e9:.1f}" if shown else "-", *calls,
            f"{flops / middle / rate:.0%}", f"{ratio:.2f}"]  # fmt: skip


def procedures(cfg: RunConfig, tiny: bool, with_official: bool, ways: dict[str, list[Any]]) -> Iterator[Procedure]:
    """The official one, if it is asked for, and ours in each combination of `ways`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratio, batch = cfg.critic.ratio, cfg.optim.batch

    def theirs() -> Callable[[], Any]:
        small = TINY_OFFICIAL if tiny else None
        return official.Official(batch, cfg.data.resolution, ratio, torch.device(device), small).iterate

    if with_official:
        yield started("official", theirs, ratio)
    for precision, compilation, graphs in product(*ways.values()):
        options = {"compiled": compilation, "graphs": graphs}

        def ours(precision: str = precision, options: dict[str, Any] = options) -> Callable[[], Any]:
            place = hardware(device, torch.get_num_threads(), **options)
            training = random_training(changed(cfg, batch, precision), place)

            def iterate() -> None:
                with float32_products(precision):
                    training.iterate()
                training.recent.clear()

            return iterate

        words = [precision, f"compiled {compilation}" if compilation else "", "graphs" if graphs else ""]
        yield started("ours, " + ", ".join(filter(None, words)), ours, ratio)


def until_interrupted(work: Iterator[Item]) -> list[Item]:
    """What `work` gives before the first SIGINT or SIGTERM, which `timeout` sends."""
    found, asked = list[Item](), list[int]()

    def interrupt(number: int, _: Any) -> None:
        asked.append(number)
        if len(asked) == 1:  # `timeout` may send a second one
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for one in work:
            found.append(one)
            if asked:  # a capture that was cut off has turned the exception into one of its own
                break
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        print("interrupted: what is ready is measured, what was measured is shown", file=sys.stderr)
    return found


def main(
    checkout: Annotated[Path | None, typer.Option("--official", help="checkout of tianweiy/DMD2 (8d8fa55)")] = None,
    edm: Annotated[Path | None, typer.Option(help="checkout of NVlabs/edm, in the place of DMD2's copy of it")] = None,
    base: Annotated[str, typer.Option(help="of ours; the official code knows imagenet64 only")] = "imagenet64",
    batch: Annotated[int, typer.Option(help="by default 40 of ImageNet-64, 2 if tiny, else the base's")] = 0,
    blocks: Annotated[int, typer.Option(help="that are timed, each of one update of the student")] = 8,
    precision: Annotated[str, typer.Option(help="values of train.precision, separated by commas")] = "",
    compiled: Annotated[str, typer.Option(help="values of training.compiled of a cluster file")] = "",
    graphs: Annotated[str, typer.Option(help="off, on or both: training.graphs")] = "",
    kernels: Annotated[int, typer.Option(help="of the GPU that are listed")] = 12,
    tiny: Annotated[bool, typer.Option("--tiny", help="small networks on two images")] = False,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    with readable_errors(), float32_products("tf32"):
        cfg = tiny_config(load_base(base)) if tiny else load_base(base)
        usual = 2 if tiny else 40 if base == "imagenet64" else cfg.optim.batch
        cfg = changed(cfg, batch or usual, cfg.train.precision)
        if checkout is not None:
            if base != "imagenet64":
                raise UserError(f"the official procedure is that of imagenet64: leave out --official for {base}")
            official.use(checkout, edm)
        ways = {"precision": listed(precision) or [cfg.train.precision], "compiled": listed(compiled) or [None],
                "graphs": [{"on": True, "off": False}[value] for value in listed(graphs)] or [None]}  # fmt: skip
        found, ratio = until_interrupted(procedures(cfg, tiny, checkout is not None, ways)), cfg.critic.ratio
        running = [one for one in found if not one.refused]
        turns = (one for number in range(blocks) for one in running[:: 1 if number % 2 else -1])
        until_interrupted(timed(one, ratio) for one in turns)
        for one in running:
            one.refused = "" if one.times else "not measured"
        for one in found:
            if not one.refused and torch.cuda.is_available():
                counts, busy = runtime_calls(lambda one=one: [one.iterate() for _ in range(ratio)])
                one.calls = {name: value / ratio for name, value in counts.items()}
                one.busy = {name: value / ratio for name, value in busy.most_common(kernels)}
        rate, flops = matrix_rate(), Counted(cfg).image_flops * cfg.optim.batch
        print(f"{base}{', tiny' if tiny else ''}, batch {cfg.optim.batch}, ratio {ratio}, {name_of_device()}, torch "
              f"{torch.__version__}, commit {commit()}; {flops / 1e12:.3g} TFLOP an iteration, matrix products at "
              f"{rate / 1e12:.3g} TFLOP/s; medians of {blocks} blocks of {ratio}, interleaved\n")  # fmt: skip
        first = next((one for one in found if not one.refused), Procedure("nothing"))
        rows = [row(one, cfg.optim.batch, flops, rate, first) for one in found]
        print(markdown([*HEAD, f"{first.name} / this"], rows))
        for one in found if torch.cuda.is_available() else []:
            lines = [[f"`{name[:100]}`", f"{value:.2f}"] for name, value in one.busy.items()]
            print("\n" + markdown([f"{one.name}: what the GPU ran longest", "ms / iteration"], lines))


if __name__ == "__main__":
    typer.run(main)
