"""The training of one run: models, loop, checkpoints, snapshots, log. The method itself is in step.py."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.batches import Batches
from dmd2.checkpoint import Checkpoints
from dmd2.config import TrainConfig, digest, digest_of
from dmd2.data import REAL, content_of, load_set, load_shard, save_shard
from dmd2.denoisers import Denoiser
from dmd2.errors import UserError
from dmd2.files import listing, read_json, verified, write_json, write_text
from dmd2.head import Head
from dmd2.optimiser import Optimiser
from dmd2.progress import Progress
from dmd2.rng import stream
from dmd2.run import RunId, commit
from dmd2.sample import student_sample
from dmd2.step import Logs, Models, brightness, regression_distance, train_step
from dmd2.teachers import load_teacher, null_condition

TEACHERS, PAIRS = Path("data/teachers"), Path("data/pairs")
PROBE_SEEDS = list(range(100))  # fixed-noise samples whose brightness is followed during training


@dataclass(frozen=True)
class Hardware:
    """How a run is executed, without any effect on what it computes beyond rounding."""

    device: str = "cpu"
    threads: int = 1
    micro_batch: int = 1 << 30


@dataclass(frozen=True)
class Inputs:
    """Manifests a training reads; their content is part of the identity of its checkpoints."""

    teacher: Path
    real: Path | None
    pairs: Path | None
    init: Path | None

    @staticmethod
    def of(run: RunId, cfg: TrainConfig) -> "Inputs":
        """The conventional places for `cfg`."""
        init = cfg.train.init_from and RunId(run.base, cfg.train.init_from, run.seed).folder / "train.json"
        return Inputs(
            TEACHERS / cfg.teacher.name / "manifest.json",
            REAL / cfg.data.name / "manifest.json" if cfg.needs_real else None,
            PAIRS / cfg.pair_set / "manifest.json" if cfg.needs_pairs else None,
            Path(init) if init else None,
        )

    def identity(self) -> dict[str, str | None]:
        """Content hash of every input."""
        paths = {"teacher": self.teacher, "real": self.real, "pairs": self.pairs, "init": self.init}
        return {name: None if path is None else content_of(path) for name, path in paths.items()}


class Training:
    """One run in memory. Build it, then call `run`; the same call after a kill continues from the newest checkpoint."""

    def __init__(self, run: RunId, cfg: TrainConfig, hardware: Hardware, inputs: Inputs) -> None:
        self.run_id, self.cfg, self.hardware, self.folder = run, cfg, hardware, run.folder
        self.device = torch.device(hardware.device)
        self.key = digest_of({"config": digest(cfg), "inputs": inputs.identity(), "seed": run.seed})
        self.checkpoints = Checkpoints(self.folder / f"checkpoints-{self.key}")
        self.snapshots = self.folder / f"snapshots-{self.key}"
        self.log_path = self.folder / "log.jsonl"
        self.models = build_models(cfg, run.seed, inputs, self.device)
        self.ema = deepcopy(self.models.student).requires_grad_(False) if cfg.optim.ema else None
        real = load_set(inputs.real) if inputs.real else None
        pairs = load_set(inputs.pairs) if inputs.pairs else None
        self.batches = Batches(cfg, run.seed, self.device, hardware.micro_batch, real, pairs)
        self.step, self.seconds = 0, 0.0
        self.recent: list[tuple[int, Logs]] = []  # since the last log line, kept as tensors to avoid a sync per step
        self.log: list[dict[str, float]] = []

    def run(self) -> Path:
        """Train to the end and write train.json.

        Raises:
            UserError: a loss is not finite, a file cannot be written, or another process trains this run.
            KeyboardInterrupt: on SIGINT or SIGTERM, after saving a checkpoint.
        """
        with single_writer(self.folder), stop_signals() as stopped:
            self.resume()
            progress = Progress(str(self.run_id), self.cfg.train.steps, self.step)
            while self.step < self.cfg.train.steps:
                started = time.monotonic()
                self.iterate()
                self.seconds += time.monotonic() - started
                progress.update(self.step, _shown(self.recent[-1][1]) if self.recent else {})
                self.save(force=bool(stopped))
                if stopped:
                    raise KeyboardInterrupt
            return self.finish()

    def iterate(self) -> None:
        """One iteration with its logging."""
        it = self.step
        self.recent.append((it, train_step(self.models, self.batches.at(it), it, self.cfg)))
        self.step += 1
        if self.ema is not None and self.cfg.optim.ema and it % self.cfg.critic.ratio == 0:
            targets = [p.detach() for p in self.models.student.parameters()]
            torch._foreach_lerp_(list(self.ema.parameters()), targets, 1 - self.cfg.optim.ema)
        if self.step % self.cfg.train.log_every == 0 or self.step == self.cfg.train.steps:
            self.write_log()

    def write_log(self) -> None:
        """Check the last iterations, then append their last values and the fixed-noise brightness to the log."""
        self.check_finite()
        values: dict[str, Tensor] = {}
        for _, logs in self.recent:
            values |= logs
        line: dict[str, float] = {"step": self.step, "seconds": round(self.seconds, 2)}
        line |= {name: float(value) for name, value in values.items()}
        line["probe/brightness"] = float(brightness(self.probe()))
        self.log.append(line)
        self.recent = self.recent[-1:]
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def check_finite(self) -> None:
        """Stop at the first iteration whose losses are not finite; checkpoints were all taken before it."""
        for it, logs in self.recent:
            bad = [name for name, value in logs.items() if not bool(torch.isfinite(value))]
            if bad:
                kept = f"the checkpoint of step {self.checkpoints.newest_step()} is kept"
                raise UserError(
                    f"{self.run_id}: {bad[0]} is {float(logs[bad[0]])} at step {it}; {kept}: lower optim.lr or raise "
                    f"critic.ratio (log: {self.log_path})"
                )

    def probe(self) -> Tensor:
        """Images of the student from fixed noise; a text run takes the first captions of its real set."""
        cond, real = None, self.batches.real
        if self.cfg.data.classes == 0 and real is not None:
            cond = real.condition(torch.arange(len(PROBE_SEEDS)) % len(real), self.device)
        return student_sample(self.student, self.cfg, PROBE_SEEDS, self.device, cond=cond)

    @property
    def student(self) -> Denoiser:
        """The weights that are evaluated: the EMA when there is one."""
        return self.ema or self.models.student

    def save(self, force: bool = False) -> None:
        """Write a snapshot and a checkpoint when they are due."""
        train = self.cfg.train
        last = self.step == train.steps
        if last or self.step % train.snapshot_every == 0:
            self.check_finite()
            state = {name: value.contiguous() for name, value in self.student.network.state_dict().items()}
            save_shard(self.snapshots / f"{self.step:07d}.safetensors", state)
        if last or force or self.step % train.checkpoint_every == 0:
            self.check_finite()
            self.checkpoints.save(self.step, self.state())

    def state(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; randomness is addressed, so there is no generator state."""
        m = self.models
        modules = {"student": m.student, "critic": m.critic, "head": m.head, "ema": self.ema}
        state = {name: module.state_dict() for name, module in modules.items() if module is not None}
        optimisers = {"student_optimiser": m.student_optimiser, "critic_optimiser": m.critic_optimiser}
        state |= {name: optimiser.state_dict() for name, optimiser in optimisers.items()}
        return {**state, "step": self.step, "seconds": self.seconds, "log": self.log}

    def resume(self) -> None:
        """Load the newest good checkpoint of exactly this run and set the log back to it."""
        m, state = self.models, self.checkpoints.load_latest(self.device, self.cfg.train.steps)
        if state is not None:
            modules = {"student": m.student, "critic": m.critic, "head": m.head, "ema": self.ema}
            for name, module in modules.items():
                if module is not None:
                    module.load_state_dict(state[name])
            m.student_optimiser.load_state_dict(state["student_optimiser"])
            m.critic_optimiser.load_state_dict(state["critic_optimiser"])
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        write_text(self.log_path, "".join(json.dumps(line) + "\n" for line in self.log))

    def finish(self) -> Path:
        """Write train.json, the node of the DAG that says this run is complete."""
        files = [path for path in sorted(self.snapshots.glob("*.safetensors")) if int(path.stem) <= self.step]
        record = {
            "kind": "run", "run": str(self.run_id), "key": self.key, "steps": self.step,
            "student_updates": -(-self.step // self.cfg.critic.ratio), "seconds": round(self.seconds, 1),
            "device": self.device.type if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "threads": self.hardware.threads, "torch": torch.__version__, "commit": commit(),
            "config": self.cfg.model_dump(mode="json"), "last": self.log[-1] if self.log else {},
            "files": listing(files, self.folder),
        }  # fmt: skip
        write_json(self.folder / "train.json", record)
        return self.folder / "train.json"


def build_models(cfg: TrainConfig, seed: int, inputs: Inputs, device: torch.device) -> Models:
    """Teacher from its manifest; student and critic as copies of it, or of another run's weights (``init_from``)."""
    precision = cfg.train.precision
    teacher = load_teacher(inputs.teacher, cfg.teacher.parameterisation, precision).to(device)
    student, critic = (deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
    if inputs.init is not None:
        _load_weights(inputs.init, student, critic)
    if precision == "bf16" and cfg.teacher.parameterisation == "eps":
        teacher.network.to(torch.bfloat16)
    head = None
    if cfg.gan.on:
        probe = teacher if cfg.gan.features_from == "teacher" else critic
        head = build_head(probe, cfg, seed, device)
    null = null_condition(cfg.data, cfg.teacher.guidance)
    return Models(
        student, teacher, critic, head,
        student_optimiser=Optimiser([student], cfg.optim, cfg.optim.lr),
        critic_optimiser=Optimiser([critic, head], cfg.optim, cfg.optim.lr * cfg.critic.lr_multiplier),
        null=None if null is None else null.to(device),
        distance=regression_distance(cfg.regression.distance) if cfg.needs_pairs else None,
    )  # fmt: skip


def build_head(denoiser: Denoiser, cfg: TrainConfig, seed: int, device: torch.device) -> Head:
    """A head fitting the denoiser's bottleneck, its initial weights a function of the seed."""
    config = denoiser.network.config
    width = config["block_out_channels"][-1]
    resolution = cfg.data.resolution // 2 ** (len(config["block_out_channels"]) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"{seed}/head").initial_seed())
        return Head(width, resolution).to(device)


def _load_weights(train_json: Path, student: Denoiser, critic: Denoiser) -> None:
    """Weights only, as the paper's second stage: the student's last snapshot and the critic of its checkpoint."""
    record = read_json(train_json)
    student.network.load_state_dict(load_shard(verified(train_json.parent, record["files"][-1])))
    state = Checkpoints(train_json.parent / f"checkpoints-{record['key']}").load_latest()
    if state is None:
        raise UserError(f"train.init_from: {train_json.parent} has no good checkpoint to take the critic from")
    critic.load_state_dict(state["critic"])


def _shown(logs: Logs) -> Logs:
    return {name: logs[name] for name in ("student/brightness", "critic/denoise", "critic/gan") if name in logs}


@contextmanager
def single_writer(folder: Path) -> Iterator[None]:
    """Hold the run's lock; a second writer gets a sentence instead of a mixed-up folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training this run; wait for it or stop it") from None
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so the loop can save before it stops."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
