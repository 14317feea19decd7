"""Checkpoints that survive kills, full disks and bit rot: atomic, checksummed, newest good one wins."""

import sys
from pathlib import Path
from typing import Any

import torch

from dmd2.errors import UserError
from dmd2.files import atomic, listing, read_json, verified, write_json


class Checkpoints:
    """The resumable states of one training in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` iterations; it counts only once its checksum lies beside it.

        Raises:
            UserError: it could not be written (disk full); older checkpoints are untouched.
        """
        path = self.folder / f"{step:08d}.pt"
        with atomic(path) as temporary:
            torch.save(state, temporary)
        write_json(path.with_suffix(".json"), {"step": step, "files": listing([path], self.folder)})
        for old in self._up_to(step)[: -self.keep]:
            old.with_suffix(".pt").unlink(missing_ok=True)
            old.unlink()

    def newest_good(self, at_most: int | None = None) -> int | None:
        """Step of the newest checkpoint of at most so many steps whose checksum holds; those passed over are named."""
        for manifest in reversed(self._up_to(at_most)):
            try:
                verified(self.folder, read_json(manifest)["files"][0])
                return int(manifest.stem)
            except UserError as error:
                print(f"checkpoint passed over: {error}", file=sys.stderr)
        return None

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state of one step, as it was saved."""
        return torch.load(self.folder / f"{step:08d}.pt", map_location=device, weights_only=True)

    def load_latest(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest good state, if there is one."""
        step = self.newest_good()
        return None if step is None else self.load(step, device)

    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        return max((int(path.stem) for path in self._up_to(None)), default=0)

    def _up_to(self, step: int | None) -> list[Path]:
        """Manifests in order of steps; a shortened training must neither resume nor prune longer ones."""
        found = sorted(self.folder.glob("*.json"))
        return found if step is None else [path for path in found if int(path.stem) <= step]
