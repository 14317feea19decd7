"""The training of one run: loop, checkpoints, snapshots, log. The method itself is in step.py."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.core import distributed
from dmd2.core.code_digest import modules_of
from dmd2.core.errors import UserError, show
from dmd2.core.files import listing, write_json, write_text, writing
from dmd2.core.interrupts import STOP, Actions, collected, single_writer
from dmd2.core.progress import Progress
from dmd2.core.retraining import code_parts, continued, current_key, other_code
from dmd2.core.run import RunId
from dmd2.data.sets import load_set, save_shard
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.method.batches import Batches
from dmd2.method.interfaces import Optimiser
from dmd2.method.step import Logs, brightness, train_step
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.lora import snapshot_state
from dmd2.training.build import build_models, in_bfloat16
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.checkpoints.parts import Spans
from dmd2.training.checkpoints.thread import CheckpointThread
from dmd2.training.execution import executed, refuse
from dmd2.training.record import record_of
from dmd2.training.sampling import probe_images, to_images
from dmd2.training.sharding import (
    gathered,
    load_local,
    local,
    local_state,
    materialise,
    recompute_activations,
    shard_module,
    sharing,
    spans_of,
)

SHOWN = ("critic/denoise", "critic/gan", "probe/brightness")  # in the progress line; L_DM is no objective


class Training:
    """One run in memory. Build it, then call `run`; the same call after a kill continues from the newest checkpoint.

    With several processes each holds the same weights, or with `Hardware.shard` its rows of them, and computes its rows
    of the batch; process 0 writes all files but the parts of sharded checkpoints.
    """

    def __init__(self, run: RunId, cfg: TrainConfig, hardware: Hardware, inputs: Inputs) -> None:
        self.run_id, self.cfg, self.hardware, self.folder = run, cfg, hardware, run.folder
        self.device = torch.device(hardware.device)
        refuse(run, cfg, hardware)
        self.sharded = hardware.shard and distributed.world_size() > 1
        self.key, self.code = current_key(run, inputs.key(cfg, run.seed)), modules_of()
        self.checkpoints = Checkpoints.of(self.folder, self.key)
        self.writer = CheckpointThread(self.checkpoints)
        self.snapshots = self.folder / f"snapshots-{self.key}"
        self.log_path = self.folder / "log.jsonl"
        self.ema: Denoiser | None = None
        self.models = build_models(cfg, run.seed, inputs, self.device, self._place)
        real = load_set(inputs.real) if inputs.real else None
        pairs = load_set(inputs.pairs) if inputs.pairs else None
        prompts = load_set(inputs.prompts) if inputs.prompts else None
        size = hardware.micro_batch or cfg.optim.batch
        self.batches = Batches(cfg, run.seed, self.device, size, real, pairs, prompts)
        for optimiser in self.optimisers.values():
            optimiser.overlap(self.batches.passes)
        self.replayed = executed(self.models, hardware)
        self.to_images = to_images(cfg, self.device)
        self.step, self.seconds = 0, 0.0
        self.recent: list[tuple[int, Logs]] = []  # since the last log line, kept as tensors to avoid a sync per step
        self.log: list[dict[str, float]] = []

    def _place(self, name: str, network: torch.nn.Module, dtype: torch.dtype) -> None:
        """Put a new network where it is trained, the student's EMA beside it."""
        if name == "student" and self.cfg.optim.ema:
            self.ema = sharing(network).requires_grad_(False)
            self._place("ema", self.ema, dtype)
        if name in ("student", "critic") and self.hardware.checkpointing:
            recompute_activations(network.network)
        if self.sharded:
            gathered_as = torch.bfloat16 if name in in_bfloat16(self.cfg) - {"teacher"} else None
            shard_module(network, self.device, dtype, gathered_as)
        else:
            materialise(network, self.device, dtype, own=name != "teacher")

    def run(self, actions: Actions = STOP, patience: float = 0) -> Path:
        """Train to the end and write finished.json.

        Args:
            actions: what to do about signals, once the iteration is complete and saved; process 0 only.
            patience: seconds to wait for another process that holds the run.

        Raises:
            UserError: a loss is not finite, a file cannot be written, or another process trains this run.
            KeyboardInterrupt: on SIGINT or SIGTERM, unless `actions` says otherwise.
        """
        alone = single_writer(self.folder, patience) if self.leads else nullcontext()
        with alone, collected(actions) as received, self.writer:
            self.resume()
            parts = code_parts(self.run_id, self.key)
            if self.leads and self.step < self.cfg.train.steps:
                parts = continued(self.run_id, self.key, self.step, self.code)
                if len(parts) > 1:
                    show(f"{self.run_id} {other_code(parts)}; --again starts anew")
            progress = Progress(str(self.run_id), self.cfg.train.steps, self.step, self.folder if self.leads else None)
            while self.step < self.cfg.train.steps:
                started = time.monotonic()
                self.iterate()
                self.seconds += time.monotonic() - started
                if self.leads:
                    progress.update(self.step, self.last_logged())
                asked = len(received)  # a signal that comes while this state is saved is for the next one
                if self.sharded:  # every process saves its part; process 0 decides whether a signal asks for it
                    self.save(force=bool(distributed.agreed(asked)))
                elif self.leads:
                    self.save(force=bool(asked))
                for _ in range(asked):
                    number = received.pop(0)
                    if self.leads:  # the others end when process 0 does
                        actions[number]()
            return self.finish(parts) if self.leads else self.folder / "finished.json"

    def last_logged(self) -> dict[str, float]:
        """The values worth watching, of the last line of the log."""
        line = self.log[-1] if self.log else {}
        return {name: line[name] for name in SHOWN if name in line}

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return distributed.rank() == 0

    def iterate(self) -> None:
        """One iteration with its logging."""
        it = self.step
        step = self.replayed or train_step
        self.recent.append((it, step(self.models, self.batches.at(it), it, self.cfg)))
        self.step += 1
        if self.ema is not None and self.cfg.optim.ema and self.cfg.critic.turns(it)[0]:
            targets = [local(p.detach()) for p in self.models.student.parameters()]
            torch._foreach_lerp_([local(p) for p in self.ema.parameters()], targets, 1 - self.cfg.optim.ema)
        if self.step % self.cfg.train.log_every == 0 or self.step == self.cfg.train.steps:
            self.write_log()

    def write_log(self) -> None:
        """Check the last iterations, then append their last values and the fixed-noise brightness to the log."""
        self.check_finite()
        values: dict[str, Tensor] = {}
        for _, logs in self.recent:
            values |= logs
        self.recent = self.recent[-1:]
        # Losses are shares of the global batch; gradient norms are taken after the sum and equal everywhere.
        values |= distributed.sum_values({name: v for name, v in values.items() if not name.endswith("/grad_norm")})
        if not self.leads and not self.sharded:
            return
        line: dict[str, float] = {"step": self.step, "seconds": round(self.seconds, 2)}
        line |= {name: float(value) for name, value in values.items()}
        line["probe/brightness"] = float(brightness(self.probe()))  # all processes sample a sharded student
        if not self.leads:
            return
        self.log.append(line)
        with writing(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def check_finite(self) -> None:
        """Stop at the first iteration whose losses are not finite; checkpoints were all taken before it."""
        values = [value for _, logs in self.recent for value in logs.values()]
        # One look at all of them: a look at each would have the host wait for a GPU some thousand times.
        if not values or bool(torch.isfinite(torch.stack(values)).all()):
            return
        it, logs = next(one for one in self.recent if not all(map(torch.isfinite, one[1].values())))
        name = next(name for name, value in logs.items() if not torch.isfinite(value))
        kept = ""
        try:
            self.writer.wait()
        except UserError as failure:
            kept = f"{failure}; "
        raise UserError(
            f"{self.run_id}: {name} is {float(logs[name])} at step {it}; {kept}the checkpoint of step "
            f"{self.checkpoints.newest_step()} is kept: lower optim.lr or raise critic.ratio (log: {self.log_path})"
        )

    def probe(self) -> Tensor:
        """Images of the student from fixed noise; their number is none for which passes are compiled."""
        compiled = self.hardware.compiled != "none"
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return probe_images(self.student, self.cfg, self.batches, self.to_images)

    @property
    def student(self) -> Denoiser:
        """The weights that are evaluated: the EMA when there is one."""
        return self.ema or self.models.student

    def save(self, force: bool = False) -> None:
        """Write a snapshot and a checkpoint when they are due.

        Training goes on while the checkpoint is written, unless it ends here or may end (`force`). That of a sharded
        training is waited for: its parts are listed by a message among all processes, in which a thread may not meddle.
        """
        self.writer.check()
        train = self.cfg.train
        last = self.step == train.steps
        if last or self.step % train.snapshot_every == 0:
            self.check_finite()
            self.save_snapshot()
        if last or force or self.step % train.checkpoint_every == 0:
            self.check_finite()
            if not (last or force or self.sharded):
                return self.writer.save(self.step, self.state())
            self.writer.wait()
            self.checkpoints.save(self.step, self.state(), self.spans())
        return None

    def save_snapshot(self) -> None:
        """Write the student as it is now; all processes must take part if it is sharded."""
        state = gathered(self.student.network.state_dict())
        if self.leads:
            save_shard(self.snapshots / f"{self.step:07d}.safetensors", snapshot_state(self.student.network, state))

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        """Networks whose weights change, by name."""
        modules = {"student": self.models.student, "critic": self.models.critic, "head": self.models.head}
        return {name: module for name, module in {**modules, "ema": self.ema}.items() if module is not None}

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        """Both optimisers, by name."""
        return {"student_optimiser": self.models.student_optimiser, "critic_optimiser": self.models.critic_optimiser}

    def state(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; randomness is addressed, so there is no generator state.

        It holds only this process's rows of sharded tensors; `spans` says which.
        """
        state: dict[str, Any] = {name: local_state(module) for name, module in self.trained.items()}
        state |= {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        return {**state, "step": self.step, "seconds": self.seconds, "log": self.log}

    def spans(self) -> Spans | None:
        """Rows of sharded tensors that this process owns, by their path in `state`; None unless networks are split."""
        if not self.sharded:
            return None
        found: dict[str, tuple[int, int]] = {}
        for who, module in self.trained.items():
            found |= spans_of(module, who)
        for who, optimiser in self.optimisers.items():
            found |= {f"{who}/state/{number}": rows for number, rows in optimiser.spans().items()}
        return found

    def resume(self) -> None:
        """Load the newest good checkpoint of this run, the same in every process; snapshots and log go back to it.

        Snapshots after it are deleted: the iterations that made them are repeated, and on a GPU may give other weights.
        A training whose `train.steps` was lowered to a checkpoint is complete here, and its last snapshot is written.
        """
        newest = self.checkpoints.newest_good(self.cfg.train.steps) if self.leads else None
        step = distributed.agreed(newest or 0)
        if step:
            self.load(self.checkpoints.load(step, self.spans()))
            if self.leads:
                show(f"{self.run_id} resumes at step {step} of {self.cfg.train.steps}")
        if self.leads:
            for path in self.snapshots.glob("*.safetensors"):
                if self.step < int(path.stem) <= self.cfg.train.steps:
                    path.unlink()
            write_text(self.log_path, "".join(json.dumps(line) + "\n" for line in self.log))
        if self.step == self.cfg.train.steps:
            self.save_snapshot()

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, module in self.trained.items():
            load_local(module, state[name])
            if isinstance(module, Denoiser):
                module.refresh()
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state[name])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def finish(self, code: list[dict[str, Any]]) -> Path:
        """Write finished.json, the record of a complete training, with the `code` that trained each part of it."""
        files = [path for path in sorted(self.snapshots.glob("*.safetensors")) if int(path.stem) <= self.step]
        done = {"run": str(self.run_id), "key": self.key, "steps": self.step, "seconds": round(self.seconds, 1)}
        last = self.log[-1] if self.log else {}
        made = {**record_of(self.cfg, self.hardware, self.step), "last": last, "code": code}
        write_json(self.folder / "finished.json", {"kind": "run", **done, **made, "files": listing(files, self.folder)})
        return self.folder / "finished.json"
