"""``dmd2 export``."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dmd2.core.errors import readable_errors
from dmd2.launch.names import Run, run_named


def main(
    run: Run,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    step: Annotated[int | None, typer.Option(help="snapshot of this step")] = None,
    select: Annotated[
        Literal["last", "best"] | None, typer.Option(help="last (default), or best by the first metric of eval.metrics")
    ] = None,
    teacher_licence: Annotated[str | None, typer.Option(help="identifier or name, for the card")] = None,
    force: Annotated[bool, typer.Option(help="replace an earlier export")] = False,
) -> None:
    """Export the student of RUN to OUT: a diffusers network and scheduler, a model card, and a script to sample it."""
    with readable_errors():
        named = run_named(run)
        from dmd2.publish.diffusers_folder import export
        from dmd2.training.snapshot import find_snapshot

        snapshot = find_snapshot(named, step, select)
        export(snapshot, out, teacher_licence, force)
        if teacher_licence is None:
            print("warning: the card says that no licence was stated: pass --teacher-licence", file=sys.stderr)
        if snapshot.measured is None:
            print("warning: this snapshot was not evaluated, the card has no metrics", file=sys.stderr)
        print(f"{out}: step {snapshot.step} of {named}; python {out / 'sample.py'} samples it")


if __name__ == "__main__":
    typer.run(main)
