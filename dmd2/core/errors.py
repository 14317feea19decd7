"""The exception for users: its text is a sentence that says what is wrong, where, and what to do."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, or a state that the user must resolve; its text is one clear sentence."""


class CannotWriteError(UserError):
    """The system refused a write: the disk is full or read-only, or the write is not allowed."""


def did_you_mean(wrong: object, known: Iterable[str], otherwise: str = "") -> str:
    """End of a sentence about an unknown name: the nearest known name, or else `otherwise`."""
    near = difflib.get_close_matches(str(wrong), list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else otherwise


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a `UserError` or Ctrl-C into one line on stderr and a non-zero exit status (1 or 130)."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: everything saved so far is kept; the same command continues", file=sys.stderr)
        sys.exit(130)
