"""Train one run undisturbed and once more under SIGKILL at random moments; compare the final weights.

Run from a workspace that has data/ (teacher, real, pairs): ``python -m tests.workflow.kill_loop BASE/RUN KILLS``.
Every training is a forked child, so only one import is paid. Prints one JSON line.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from dmd2.ablations import load_experiment
from dmd2.config import TrainConfig
from dmd2.files import read_json
from dmd2.run import RunId
from dmd2.trainer import Hardware, Inputs, Training


def spawn(run: RunId, cfg: TrainConfig) -> int:
    """Start the training in a child process."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        Training(run, cfg, Hardware("cpu", 1, cfg.optim.batch), Inputs.of(run, cfg)).run()
        status = 0
    finally:
        os._exit(status)


def final_weights(run: RunId) -> str:
    """Checksum of the last snapshot."""
    return read_json(run.folder / "train.json")["files"][-1]["sha256"]


def main(name: str, kills: int) -> None:
    """Run both trainings and print what happened."""
    torch.set_num_threads(1)
    base, row = name.split("/")
    cfg = load_experiment().runs[base, row].training()
    calm, disturbed = RunId(base, f"{row}-calm", 0), RunId(base, f"{row}-killed", 0)
    started = time.monotonic()
    assert os.waitpid(spawn(calm, cfg), 0)[1] == 0
    duration = time.monotonic() - started
    chance, moments = random.Random(kills), []
    while len(moments) < kills:
        pid = spawn(disturbed, cfg)
        moment = chance.uniform(0.02, 0.6) * duration
        time.sleep(moment)
        if (disturbed.folder / "train.json").exists():
            os.waitpid(pid, 0)
            (disturbed.folder / "train.json").unlink()  # it finished first: the next round finds a finished training
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        log = disturbed.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        moments.append([round(moment, 2), len(lines)])
    assert os.waitpid(spawn(disturbed, cfg), 0)[1] == 0
    same_log = _losses(calm) == _losses(disturbed)
    print(json.dumps({"same_weights": final_weights(calm) == final_weights(disturbed), "same_log": same_log,
                      "kills_and_log_lines": moments, "undisturbed_seconds": round(duration, 1)}))  # fmt: skip


def _losses(run: RunId) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
