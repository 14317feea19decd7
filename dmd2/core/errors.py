"""The one exception a user is meant to read: a sentence saying what is wrong, where, and what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or a state the user must resolve; its text is one clear sentence."""


class CannotWriteError(UserError):
    """The system refused a write: full, read-only, immutable, not allowed."""


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
