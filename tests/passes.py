"""The passes that objectives asked for, kept with their results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

import dmd2.method.passes
from dmd2.method.passes import Pass, Turn


@contextmanager
def kept_passes() -> Iterator[list[tuple[Pass, Tensor]]]:
    """Every pass of the block and what it gave, in the order in which objectives asked."""
    kept: list[tuple[Pass, Tensor]] = []
    run = dmd2.method.passes.run_passes

    def keeping(turn: Turn, passes: Sequence[Pass]) -> list[Tensor]:
        results = run(turn, passes)
        kept.extend(zip(passes, results, strict=True))
        return results

    with patch("dmd2.method.passes.run_passes", keeping):
        yield kept
