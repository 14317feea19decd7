"""Folders that are written as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dmd2.core.errors import UserError
from dmd2.core.files import writer


@contextmanager
def atomic_folder(target: Path, replaceable: bool, refusal: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only once the block ended and its bytes reached the disk.

    Args:
        target: the folder to write.
        replaceable: whether a `target` that exists may be replaced.
        refusal: what is said of one that may not.

    Raises:
        UserError: `target` exists and may not be replaced, or a file cannot be written; `target` is then as before.
    """
    target = target.absolute()
    if target.exists() and not replaceable:
        raise UserError(f"{target} {refusal}")
    name = f".{target.name}.{writer()}"
    temporary, old = (target.with_name(f"{name}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors creates its files readable by the owner only
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; nothing was changed there") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
