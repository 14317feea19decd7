"""Counts of a training iteration without a GPU, of this checkout and of another side by side, as a Markdown table.

    git worktree add /tmp/release 8819aa2
    python -m benchmarks.counts imagenet64 sdxl-lora --against /tmp/release --precision bf16,bf16-body

Network passes, samples that are encoded and decoded, operations that launch kernels, bytes that conversions of dtype
write, uploads, places where the host waits for the device, arithmetic, and the peak of memory: see
`benchmarks.counting`. The other checkout takes the first precision; small networks always take that of their base.
``--compiled blocks,network`` adds graphs, graph breaks and recompilations of small networks.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.counting import Case
from benchmarks.tables import line, listed, markdown
from dmd2.core.errors import UserError, readable_errors
from dmd2.experiment.tables import load_base

ROOT = Path(__file__).parents[1]
CASES = {
    "imagenet64": Case("imagenet64", 40, ""),
    "sd15": Case("sd15", 8, ""),
    "sdxl-lora": Case("sdxl", 1, "", lora=64),
    "sdxl-lora-checkpointing": Case("sdxl", 1, "", lora=64, checkpointing=True),
    "digits": Case("digits", 64, "", meta=False),
    "digits-4step": Case("digits", 64, "", meta=False, run="4step"),
}
COMPILED = {
    "digits": Case("digits", 8, "fp32"),
    "digits-4step": Case("digits", 8, "fp32", run="4step"),
    "imagenet64, small": Case("imagenet64", 2, "bf16-body", tiny=True),
}
# Quantities of the table: its heading, the unit that they are told in, and decimals.
COLUMNS = {
    "network passes": ("passes", 1, 0), "samples through encoders": ("encoded", 1, 0),
    "samples through decoders": ("decoded", 1, 0), "operations that launch kernels": ("launches", 1, 0),
    "bytes cast": ("GB cast", 1e9, 2), "uploads": ("uploads", 1, 0), "host waits": ("waits", 1, 0),
    "floating-point operations": ("TFLOP", 1e12, 3), "peak bytes": ("peak, GB", 1e9, 2),
}  # fmt: skip
KINDS = ("student", "critic only")
Found = dict[str, dict[str, Any]]
# The first package comes from here, what it imports of dmd2 from the checkout.
CHILD = "import sys, benchmarks, tests; sys.path.insert(0, sys.argv[1]); from benchmarks.counting import main; main()"


def counted(checkout: Path, case: Case) -> Any:
    """Counts of a case in a checkout, in a process of its own: by kind of iteration, or of compilation.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-P", "-c", CHILD, str(checkout.resolve()), json.dumps(case)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout} cannot be counted: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(name: str, versions: dict[str, Found]) -> list[list[str]]:
    """Lines of the table for a case, one for each kind of iteration; a cell has one number where all are equal."""

    def cell(kind: str, quantity: str) -> str:
        _, unit, decimals = COLUMNS[quantity]
        told = [f"{found[kind][quantity] / unit:,.{decimals}f}" if quantity in found[kind] else ""
                for found in versions.values()]  # fmt: skip
        return told[0] if len(set(told)) == 1 else " -> ".join(told)

    return [[name, kind, *(cell(kind, quantity) for quantity in COLUMNS)] for kind in KINDS]


def passes(case: str, versions: dict[str, Found]) -> list[str]:
    """What passes there are, a line for each kind of iteration of a version: the samples of each."""
    return [
        f"- {case}, {name}, {kind}: " + "; ".join(f"{who} {', '.join(map(str, sizes))}" for who, sizes in ran.items())
        for name, found in versions.items()
        for kind, ran in ((kind, counts["passes"]) for kind, counts in found.items())
    ]


def compilation(ways: list[str]) -> str:
    """Table of what compilation traces; no graph should come later, and none should break."""
    rows = []
    for (name, case), how in product(COMPILED.items(), ways):
        found = counted(ROOT, case._replace(compiled=how))
        rows.append([f"{name}, {case.precision}", how, *(str(found[key]) for key in ("graphs", "breaks", "later"))])
    return markdown(["case", "compiled", "graphs of two iterations", "graph breaks", "graphs traced later"], rows)


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"some of {', '.join(CASES)}; all by default")] = None,
    against: Annotated[Path | None, typer.Option(help="another checkout, which comes first")] = None,
    compiled: Annotated[str, typer.Option(help="also count what PyTorch traces: blocks, network")] = "",
    precision: Annotated[str, typer.Option(help="of this checkout, separated by commas; by default the base's")] = "",
) -> None:
    with readable_errors():
        wanted, text = cases or list(CASES), []
        if unknown := set(wanted) - set(CASES):
            raise UserError(f"there is no case {', '.join(sorted(unknown))}: {', '.join(CASES)}")
        print(markdown(["case", "iteration", *(heading for heading, _, _ in COLUMNS.values())], []), flush=True)
        for name in wanted:
            case = CASES[name]
            given = (listed(precision) if case.meta else []) or [load_base(case.base).train.precision]
            versions = {} if against is None else {against.name: counted(against, case._replace(precision=given[0]))}
            versions |= {one: counted(ROOT, case._replace(precision=one)) for one in given}
            for cells in rows(f"{name}, {case.batch} images, {' -> '.join(versions)}", versions):
                print(line(cells), flush=True)
            text += passes(name, versions)
        print("\n" + "\n".join(text))
        if compiled:
            print("\n" + compilation(listed(compiled)))


if __name__ == "__main__":
    typer.run(main)
