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
        for old in sorted(self.folder.glob("*.json"))[: -self.keep]:
            old.with_suffix(".pt").unlink(missing_ok=True)
            old.unlink()

    def load_latest(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest state whose checksum holds, or None; each one passed over is named on stderr."""
        for manifest in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                path = verified(self.folder, read_json(manifest)["files"][0])
                return torch.load(path, map_location=device, weights_only=True)
            except UserError as error:
                print(f"checkpoint passed over: {error}", file=sys.stderr)
        return None
