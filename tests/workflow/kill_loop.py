"""Train one run undisturbed and once more under SIGKILL at random moments; compare the final weights.

Run from a workspace that has data/ (teacher, real, pairs): ``python -m tests.workflow.kill_loop BASE/RUN KILLS``.
Every training is a forked child, so only one import is paid. Prints one JSON line.

A kill is timed from the child's first complete iteration, not from its start: a moment drawn over the whole duration
falls either into the start-up or, since each round continues the last one, after the end. With K kills a round lasts at
most 1/(K+1) of the undisturbed iterations, so that even K rounds without any loss do not reach the end. Both trainings
save with every log line, so that a round gains more than its kill loses and the next one resumes from further on.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from dmd2.core.files import read_json
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.experiment.tables import load_experiment
from dmd2.training.trainer import Training


def spawn(run: RunId, cfg: TrainConfig) -> int:
    """Start the training in a child process."""
    (run.folder / "progress.json").unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        Training(run, cfg, Hardware("cpu", 1), Inputs.of(run, cfg)).run()
        status = 0
    finally:
        os._exit(status)


def await_iteration(run: RunId, pid: int) -> bool:
    """Return once the child has completed an iteration, which makes it write progress.json; False if none was left."""
    while not (run.folder / "progress.json").exists():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and (run.folder / "finished.json").exists():
            return False
        assert not ended, f"{run} ended with {status} before its first iteration"
        time.sleep(0.005)
    return True


def train_calmly(run: RunId, cfg: TrainConfig) -> float:
    """Train undisturbed; returns the seconds from the first iteration to the end."""
    pid = spawn(run, cfg)
    await_iteration(run, pid)
    started = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0
    return time.monotonic() - started


def train_and_kill(run: RunId, cfg: TrainConfig, seconds: float) -> int | None:
    """Train, kill that many seconds after the first iteration; returns the log lines there are, None if it finished."""
    pid = spawn(run, cfg)
    if not await_iteration(run, pid):
        return None
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    log = (run.folder / "log.jsonl").read_text().splitlines()
    return None if (run.folder / "finished.json").exists() else len(log)


def main(name: str, kills: int) -> None:
    """Run both trainings and print what happened."""
    torch.set_num_threads(1)
    base, row = name.split("/")
    cfg = load_experiment().runs[base, row].training()
    often = cfg.train.model_copy(update={"checkpoint_every": cfg.train.log_every})
    cfg = cfg.model_copy(update={"train": often})
    calm, disturbed = RunId(base, f"{row}-calm", 0), RunId(base, f"{row}-killed", 0)
    duration = train_calmly(calm, cfg)
    chance, moments = random.Random(kills), []
    while len(moments) < kills:
        moment = chance.uniform(0, duration / (kills + 1))
        lines = train_and_kill(disturbed, cfg, moment)
        if lines is None:
            break  # it finished first, on a machine that has become much faster: the rest is not worth a kill
        moments.append([round(moment, 2), lines])
    assert os.waitpid(spawn(disturbed, cfg), 0)[1] == 0
    same_log = _losses(calm) == _losses(disturbed)
    print(json.dumps({"same_weights": final_weights(calm) == final_weights(disturbed), "same_log": same_log,
                      "kills_and_log_lines": moments, "undisturbed_seconds": round(duration, 1)}))  # fmt: skip


def final_weights(run: RunId) -> str:
    """Checksum of the last snapshot."""
    return read_json(run.folder / "finished.json")["files"][-1]["sha256"]


def _losses(run: RunId) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
