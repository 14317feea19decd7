"""Benchmarks measure, tests do not; but benchmarks must run: all start, and what needs no GPU counts."""

import importlib
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.counting import Case, on_cpu
from benchmarks.counts import rows
from benchmarks.train_step import until_interrupted
from tests.conftest import ROOT

NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "typer.run(main)" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts(name: str) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{name}").main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupted_benchmark_keeps_what_is_ready(swallowed: bool) -> None:
    def work() -> Iterator[int]:
        yield 1
        with suppress(*[KeyboardInterrupt] * swallowed):
            signal.raise_signal(signal.SIGTERM)
        yield 2
        yield 3

    before = signal.getsignal(signal.SIGTERM)
    assert until_interrupted(work()) == [1, 2][: 1 + swallowed]
    assert signal.getsignal(signal.SIGTERM) is before


def test_counts_of_digits() -> None:
    """What the step is to keep: no wait for the device, one pass of the critic in its turn."""
    found = on_cpu(Case("digits", 4, "fp32", meta=False))
    assert found["student"]["host waits"] == found["critic only"]["host waits"] == 0
    assert found["critic only"]["passes"] == {
        "student encoder": [4], "student decoder": [4], "critic encoder": [12], "critic decoder": [4],
    }  # fmt: skip
    assert found["student"]["passes"]["teacher decoder"] == [4]
    assert found["critic only"]["operations that launch kernels"] < found["student"]["operations that launch kernels"]
    before = {kind: {**counts, "uploads": 7} for kind, counts in found.items()}
    student, critic = rows("digits", {"before": before, "now": found})
    assert student[:5] == ["digits", "student", "5", "28", "16"]
    assert critic[2:4] == ["2", "16"]
    assert critic[7] == f"7 -> {found['critic only']['uploads']}"
