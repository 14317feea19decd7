"""Signals, which are handled between two iterations, and locks against a second process that makes the same."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path

from dmd2.core.errors import UserError, show
from dmd2.core.files import writing
from dmd2.core.slurm_queue import NoAnswer, is_live, state_of

LOCK = ".lock"  # of a run, held while it is trained


def stop() -> None:
    """Leave the training after a signal; its state has been saved."""
    raise KeyboardInterrupt


Actions = Mapping[int, Callable[[], None]]  # by signal: what is done after the state was saved
STOP: Actions = {signal.SIGINT: stop, signal.SIGTERM: stop}


@contextmanager
def collected(numbers: Actions) -> Iterator[list[int]]:
    """Collect these signals in a list; the loop acts on them where its state is whole."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def single_writer(
    folder: Path, patience: float = 0, name: str = LOCK, doing: str = "trains this run"
) -> Iterator[None]:
    """Hold a lock of the folder, so that no second process writes there, and delete what killed writers left.

    Args:
        folder: of a run, or of an artefact.
        patience: seconds to wait for another holder. A job that Slurm restarted may find its dying predecessor; it does
            not wait for another job that lives.
        name: file of the lock; by default the lock of the run's training.
        doing: what the holder does, for the sentence about it.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    path, until, told = folder / name, time.monotonic() + patience, False
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below; "w" would erase the holder's name
    with file:
        while True:
            try:
                flock(file, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if name == LOCK:
                    leave_to_another_job(folder)
                who = f"another process {doing}{_named(path)}"
                if time.monotonic() >= until:
                    raise UserError(f"{folder}: {who}; wait for it or stop it") from None
                if not told:
                    show(f"{folder} is locked, waiting: {who}")
                told = True
                time.sleep(5)
        with writing(path):
            file.truncate(0)
            holder = {"job": os.environ.get("SLURM_JOB_ID"), "host": socket.gethostname(), "pid": os.getpid()}
            os.write(file.fileno(), json.dumps(holder).encode())  # unbuffered, so that closing has nothing to write
        # An evaluation of a run has a lock of its own in the run's folder, where a training may be saving.
        for left in _left_behind(folder) if name == LOCK or not (folder / LOCK).exists() else ():
            with suppress(OSError):
                left.unlink()
        yield


def leave_to_another_job(folder: Path) -> None:
    """End this process if it belongs to a Slurm job while another Slurm job trains the run.

    Raises:
        UserError: another job trains the run.
    """
    own, other = os.environ.get("SLURM_JOB_ID"), _holder(folder / LOCK).get("job")
    if own is None or other in (None, own) or not is_being_trained(folder):
        return
    try:
        lives = is_live(state_of(other))
    except NoAnswer:
        lives = False  # unknown: waiting is right in either case
    if lives:
        raise UserError(f"{folder}: Slurm job {other} trains this run already; job {own} leaves it alone and ends")


def is_being_trained(folder: Path, lock: str = LOCK) -> bool:
    """Whether a process trains the run, which means that it holds the run's lock, or another one in the folder.

    This function tries a shared lock: with exclusive ones, two overviews at once would take each other for a training.
    """
    try:
        with open(folder / lock, encoding="utf-8") as file:
            flock(file, LOCK_SH | LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder(path: Path) -> dict[str, str]:
    """Who holds the lock at `path`, or held it last; empty if that is not known."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _named(path: Path) -> str:
    holder = _holder(path)
    job = f"Slurm job {holder.get('job')}, " if holder.get("job") else ""
    return f" ({job}process {holder.get('pid')} on {holder.get('host')})" if holder else ""


def _left_behind(folder: Path) -> Iterator[Path]:
    """Temporary files that killed writers left, of the files that only the holder of the lock writes."""
    for name in ("finished.json", "log.jsonl", "progress.json"):
        yield from folder.glob(f".{name}.*.tmp")
    for kind in ("checkpoints", "snapshots"):
        yield from folder.glob(f"{kind}-*/**/.*.tmp")
