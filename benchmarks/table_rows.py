"""Cost of one iteration of every row of digits-table3, relative to the `ttur` row, side by side in one process.

Rows are interleaved and medians taken, so machine noise hits them alike. Weights and images are random.
"""

import statistics
import time

import torch
import typer

from benchmarks.random_runs import changed, hardware, random_training
from benchmarks.tables import markdown
from dmd2.experiment.tables import load_experiment

ROUNDS, BLOCK = 8, 10  # a block of 10 iterations holds 2 student updates at ratio 5


def main(rounds: int = ROUNDS) -> None:
    torch.set_num_threads(1)
    experiment, trainings = load_experiment(), {}
    for row in experiment.rows["digits-table3"]:
        cfg = experiment.runs["digits", row.run]
        trainings[row.run] = random_training(changed(cfg, cfg.optim.batch, cfg.train.precision), hardware("cpu"))
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for block in range(rounds + 1):
        for name, training in trainings.items():
            started = time.process_time()
            for _ in range(BLOCK):
                training.iterate()
            if block:  # the first block warms up
                times[name].append((time.process_time() - started) / BLOCK)
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows = [[name, f"{1000 * value:.1f}", f"{value / middle['ttur']:.2f}"] for name, value in middle.items()]
    print(markdown(["row", "ms of CPU time / iteration", "relative"], rows))


if __name__ == "__main__":
    typer.run(main)
