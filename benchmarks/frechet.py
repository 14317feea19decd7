"""The Frechet distance at 2,048 dimensions: our recipes A and B against `scipy.linalg.sqrtm`, as clean-fid calls it.

Methods are interleaved in one process and medians taken, so machine noise hits them alike. About two minutes.
``python -m benchmarks.frechet [ROUNDS]``
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.linalg import sqrtm

from eval.metrics.frechet import FeatureStats, Reference, frechet_distance

DIMENSIONS, IMAGES, ROUNDS = 2048, 6000, 3


def by_sqrtm(a: FeatureStats, b: FeatureStats) -> float:
    cov_a, cov_b = a.covariance, b.covariance
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def main(rounds: Annotated[int, typer.Argument()] = ROUNDS) -> None:
    rng = np.random.default_rng(0)
    scale = np.arange(1, DIMENSIONS + 1.0) ** -0.5  # a power-law spectrum, as Inception features have
    x, y = ((rng.standard_normal((IMAGES, DIMENSIONS)) * scale).astype(np.float32) for _ in range(2))
    a, b = FeatureStats.of(x + 0.01), FeatureStats.of(y)
    reference = Reference(b)
    methods: dict[str, Callable[[], float]] = {
        "A, cached reference": lambda: reference.distance(a),
        "A with SE and bias": lambda: reference.estimate(x + 0.01).value,
        "B": lambda: frechet_distance(a, b),
        "scipy sqrtm": lambda: by_sqrtm(a, b),
    }
    reference.distance(a)  # factors the reference, once for all sets that are compared with it
    values: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            values[name] = method()
            times[name].append(time.perf_counter() - started)
            print(f"round {number + 1} of {rounds}: {name} {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    base = statistics.median(times["scipy sqrtm"])
    print(f"{DIMENSIONS} dimensions, {IMAGES} images a side, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'method':<22}{'seconds':>9}{'faster':>9}{'distance':>18}")
    for name, taken in times.items():
        seconds = statistics.median(taken)
        print(f"{name:<22}{seconds:>9.2f}{base / seconds:>8.1f}x{values[name]:>18.12f}")


if __name__ == "__main__":
    typer.run(main)
