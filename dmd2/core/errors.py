"""What users are told: progress, and errors, whose text says what is wrong, where, and what to do."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Bad input, or a state that the user must resolve; its text is one clear sentence."""


class TableError(UserError):
    """What is wrong with one table: others can be read without it."""

    def __init__(self, text: str, table: str) -> None:
        super().__init__(text)
        self.table = table


class CannotWriteError(UserError):
    """The system refused a write: the disk is full or read-only, or the write is not allowed."""


def did_you_mean(wrong: object, known: Iterable[str], otherwise: str = "") -> str:
    """End of a sentence about an unknown name: the nearest known name, or else `otherwise`."""
    near = difflib.get_close_matches(str(wrong), list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else otherwise


def terminal_of(descriptor: int | str) -> str | None:
    """What a descriptor, by its number or path, leads to, as text; None if it is closed."""
    with suppress(OSError):
        found = os.stat(descriptor)
        return f"{found.st_dev}:{found.st_ino}"
    return None


def show(line: str, kept: bool = True) -> None:
    """Print a line on stderr. Where that is the log of a job of the DAG, also on the terminal of Snakemake.

    kept: False for progress, which is not written into the log.
    """
    known = os.environ.get("DMD2_TERMINAL")
    for place in (3, f"/proc/{os.getppid()}/fd/3"):  # torchrun's processes have only that of their parent
        if known and terminal_of(place) == known:
            with suppress(OSError), open(place, "a", encoding="utf-8", closefd=place != 3) as terminal:
                print(line, file=terminal)
                if not kept:
                    return
                break
    print(line, file=sys.stderr, flush=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a `UserError` or Ctrl-C into one line on stderr and a non-zero exit status (1 or 130)."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        which = "the same command without --again" if "--again" in sys.argv else "the same command"
        show(f"interrupted: everything saved so far is kept; {which} continues")
        sys.exit(130)
