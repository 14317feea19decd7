from collections.abc import Sequence

from dmd2.changes import Written


def check_all(written: Sequence[Written]) -> None:
    pass
