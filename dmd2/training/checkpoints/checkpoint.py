"""Checkpoints that survive kills, full disks and bit rot: atomic, checksummed, newest good one wins.

A sharded training writes each checkpoint in parts, one per process; any number of processes can read them
(`parts`).
"""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.core import distributed
from dmd2.core.errors import UserError
from dmd2.core.files import atomic, listing, read_json, verified, write_json
from dmd2.core.retraining import current_key
from dmd2.core.run import RunId
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.training.checkpoints.parts import Spans, cut, flat, nested, read_parts, write_part

READERS = 8  # files whose checksums are computed at a time


class Checkpoints:
    """The resumable states of one training in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    @staticmethod
    def of(run: Path, key: str) -> "Checkpoints":
        """Checkpoints of the training `key` in the folder of a run."""
        return Checkpoints(run / f"checkpoints-{key}")

    def save(self, step: int, state: dict[str, Any], spans: Spans | None = None) -> None:
        """Write the state after `step` iterations; it counts only once the checksums of its files are listed.

        Args:
            step: iterations done.
            state: the complete state; in a sharded training, this process's rows of it.
            spans: which rows these are, in a sharded training; every process then calls this.

        Raises:
            UserError: it could not be written (disk full); older checkpoints are untouched.
        """
        if spans is None:
            path = self.folder / f"{step:08d}.pt"
            with atomic(path) as temporary:
                torch.save(state, temporary)
            return self._publish(step, {"step": step, "files": listing([path], self.folder)})
        rank, size = distributed.rank(), distributed.world_size()
        path = self.folder / f"{step:08d}" / f"part-{rank:05d}-of-{size:05d}.safetensors"
        write_part(path, state, spans, whole=rank == 0)
        files = distributed.collected_lines(listing([path], self.folder)[0])
        if rank == 0:
            values = nested({name: value for name, value in flat(state) if not isinstance(value, Tensor)})
            self._publish(step, {"step": step, "values": values, "files": files})
        return None

    def _publish(self, step: int, manifest: dict[str, Any]) -> None:
        write_json(self.folder / f"{step:08d}.json", manifest)
        for old in self._up_to(step)[: -self.keep]:
            old.with_suffix(".pt").unlink(missing_ok=True)
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            old.unlink()
        for left in self.folder.glob("*/"):  # parts of a save that was killed, which no manifest lists
            if not left.with_suffix(".json").exists():
                shutil.rmtree(left, ignore_errors=True)

    def newest_good(self, at_most: int | None = None) -> int | None:
        """Step (up to `at_most`) of the newest checkpoint whose checksums hold; prints which ones it passes over."""
        for manifest in reversed(self._up_to(at_most)):
            try:
                with ThreadPoolExecutor(READERS) as pool:
                    list(pool.map(lambda entry: verified(self.folder, entry), read_json(manifest)["files"]))
                return int(manifest.stem)
            except UserError as error:
                print(f"checkpoint passed over: {error}", file=sys.stderr)
            except (AttributeError, KeyError, TypeError):
                print(f"checkpoint passed over: {manifest} does not list its files as a save does", file=sys.stderr)
        return None

    def load(self, step: int, spans: Spans | None = None, only: str = "") -> dict[str, Any]:
        """The state of one step. Its tensors are mapped from files: copy them and drop them.

        Args:
            step: one that has a checkpoint.
            spans: the rows that are wanted; None for whole tensors.
            only: beginning of the paths that are wanted; others may be missing.
        """
        manifest = read_json(self.folder / f"{step:08d}.json")
        paths = [self.folder / entry["path"] for entry in manifest["files"]]
        if "values" in manifest:
            return nested({**dict(flat(manifest["values"])), **read_parts(paths, spans, only)})
        state = torch.load(paths[0], map_location="cpu", weights_only=True, mmap=True)
        wanted = {name: value for name, value in state.items() if f"{name}/".startswith(only)}
        return cut(wanted, spans) if spans else wanted

    def load_latest(self) -> dict[str, Any] | None:
        """The newest good state, if there is one, mapped from its files."""
        step = self.newest_good()
        return None if step is None else self.load(step)

    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        return max((int(path.stem) for path in self._up_to(None)), default=0)

    def _up_to(self, step: int | None) -> list[Path]:
        """Manifests of at most so many steps, in order: a training that was shortened leaves longer ones alone."""
        found = sorted(path for path in self.folder.glob("*.json") if path.stem.isdecimal())
        return found if step is None else [path for path in found if int(path.stem) <= step]


def verify_inputs(run: RunId, cfg: TrainConfig, inputs: Inputs) -> None:
    """Compare the checksum of every file that a training will read, the newest good checkpoint included.

    Raises:
        UserError: an input is missing or damaged.
    """
    files: list[tuple[Path, dict[str, Any]]] = []
    for name, manifest in vars(inputs).items():
        if manifest is None:
            continue
        entries = read_json(manifest)["files"]
        if name == "init":
            entries = entries[-1:]
        elif name == "pipeline":  # its text encoders have done their work
            entries = [entry for entry in entries if entry["path"].startswith(("vae", "null."))]
        files += [(manifest.parent, entry) for entry in entries]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda file: verified(*file), files))
    if inputs.init is not None:
        Checkpoints.of(inputs.init.parent, read_json(inputs.init)["key"]).newest_good()
    Checkpoints.of(run.folder, current_key(run, inputs.key(cfg, run.seed))).newest_good(cfg.train.steps)
