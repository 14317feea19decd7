"""Counts of a training iteration without a GPU, of this checkout and of another side by side, as a Markdown table.

    git worktree add /tmp/release 8819aa2
    python -m benchmarks.counts imagenet64 sdxl-lora --against /tmp/release --precision bf16,bf16-body

Network passes by network, operations that launch kernels, bytes that conversions of dtype write, uploads, places where
the host waits for the device, arithmetic, and the peak of memory: see `benchmarks.counting`. The other checkout takes
the first precision.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.counting import Case
from benchmarks.tables import listed, markdown
from dmd2.core.errors import UserError, readable_errors
from dmd2.experiment.tables import load_base

ROOT = Path(__file__).parents[1]
CASES = {
    "imagenet64": Case("imagenet64", 40, ""),
    "sd15": Case("sd15", 8, ""),
    "sdxl-lora": Case("sdxl", 1, "", lora=64),
    "sdxl-lora-checkpointing": Case("sdxl", 1, "", lora=64, checkpointing=True),
    "digits": Case("digits", 64, "", meta=False),
}
# Quantities, the unit that they are told in, and decimals.
ROWS = {
    "network passes": (1, 0), "samples through encoders": (1, 0), "samples through decoders": (1, 0),
    "operations that launch kernels": (1, 0), "bytes cast": (1e6, 2), "uploads": (1, 0), "host waits": (1, 0),
    "floating-point operations": (1e12, 3), "peak bytes": (1e9, 2),
}  # fmt: skip
NAMES = {"bytes cast": "MB cast", "floating-point operations": "TFLOP", "peak bytes": "peak, GB"}
KINDS = ("student", "critic only")
Found = dict[str, dict[str, Any]]
# The first package comes from here, what it imports of dmd2 from the checkout.
CHILD = "import sys, benchmarks, tests; sys.path.insert(0, sys.argv[1]); from benchmarks.counting import main; main()"


def counted(checkout: Path, case: Case) -> Found:
    """Counts of the two kinds of iterations of a checkout, in a process of its own.

    Raises:
        UserError: it failed.
    """
    line = [sys.executable, "-P", "-c", CHILD, str(checkout.resolve()), json.dumps(case)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout} cannot be counted: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def mean(found: Found, row: str, ratio: int) -> float:
    """Of an interval with one update of the student."""
    return (found["student"][row] + (ratio - 1) * found["critic only"][row]) / ratio


def table(columns: dict[str, Found], ratio: int) -> str:
    """Quantities by checkout and kind of iteration; ratios are those of the last column to the first."""
    first, last = next(iter(columns.values())), list(columns.values())[-1]
    head = ["per iteration", *(f"{name}: {kind}" for name in columns for kind in KINDS), "mean, last / first"]
    rows = []
    for row, (unit, decimals) in ROWS.items():
        if row in last["student"]:
            values = [f"{found[kind][row] / unit:,.{decimals}f}" for found in columns.values() for kind in KINDS]
            before, after = mean(first, row, ratio), mean(last, row, ratio)
            rows.append([NAMES.get(row, row), *values, f"{after / before:.3f}" if before else "-"])
    return markdown(head, rows)


def passes(columns: dict[str, Found]) -> list[str]:
    """What passes there are, a line for each kind of iteration of a checkout: the samples of each."""
    return [f"- {name}, {kind}: " + "; ".join(f"{who} {', '.join(map(str, n))}" for who, n in one["passes"].items())
            for name, found in columns.items() for kind, one in found.items()]  # fmt: skip


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"some of {', '.join(CASES)}; all by default")] = None,
    against: Annotated[Path | None, typer.Option(help="another checkout, which comes first")] = None,
    precision: Annotated[str, typer.Option(help="of this checkout, separated by commas; by default the base's")] = "",
) -> None:
    with readable_errors():
        for name in cases or CASES:
            if name not in CASES:
                raise UserError(f"there is no case {name}: {', '.join(CASES)}")
            case, cfg = CASES[name], load_base(CASES[name].base)
            given = listed(precision) or [cfg.train.precision]
            columns = {} if against is None else {against.name: counted(against, case._replace(precision=given[0]))}
            columns |= {one if len(given) > 1 else "now": counted(ROOT, case._replace(precision=one)) for one in given}
            print(f"\n**{name}**, {case.batch} images, {', '.join(given)}\n")
            print(table(columns, cfg.critic.ratio) + "\n\n" + "\n".join(passes(columns)), flush=True)


if __name__ == "__main__":
    typer.run(main)
