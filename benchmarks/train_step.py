"""Cost of one iteration of every row of digits-table3, relative to the `ttur` row, side by side in one process.

Rows are interleaved and medians taken, so machine noise hits them alike. Needs data/ (run `make demo` once).
"""

import statistics
import time

import torch

from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.experiment.tables import load_experiment
from dmd2.method.step import train_step
from dmd2.training.trainer import Training

ROUNDS, BLOCK = 8, 10  # a block of 10 iterations holds 2 student updates at ratio 5


def main() -> None:
    torch.set_num_threads(1)
    experiment = load_experiment()
    trainings = {}
    for row in experiment.rows["digits-table3"]:
        cfg = experiment.runs["digits", row.run].training()
        run = RunId("digits", row.run, 999)
        trainings[row.run] = Training(run, cfg, Hardware("cpu", 1), Inputs.of(run, cfg))
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for block in range(ROUNDS + 1):
        for name, t in trainings.items():
            started = time.perf_counter()
            for it in range(block * BLOCK, (block + 1) * BLOCK):
                train_step(t.models, t.batches.at(it), it, t.cfg)
            if block:  # the first block warms up
                times[name].append((time.perf_counter() - started) / BLOCK)
    base = statistics.median(times["ttur"])
    print(f"{'row':<16}{'ms/iteration':>14}{'relative':>10}")
    for name, values in times.items():
        print(f"{name:<16}{1000 * statistics.median(values):>14.1f}{statistics.median(values) / base:>10.2f}")


if __name__ == "__main__":
    main()
