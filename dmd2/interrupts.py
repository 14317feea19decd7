"""What may come between two iterations: signals, and a second process that makes the same."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from dmd2.errors import UserError


def stop() -> None:
    """Leave the training after a signal; its state has been saved."""
    raise KeyboardInterrupt


Actions = Mapping[int, Callable[[], None]]  # what to do about a signal once the state is saved
STOP: Actions = {signal.SIGINT: stop, signal.SIGTERM: stop}


@contextmanager
def collected(numbers: Actions) -> Iterator[list[int]]:
    """Collect these signals in a list, so that the loop can act on them at a point where its state is whole."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def single_writer(
    folder: Path, patience: float = 0, name: str = ".lock", doing: str = "trains this run"
) -> Iterator[None]:
    """Hold a lock of the folder, by default its run's; a second writer gets a sentence instead of a mixed-up folder.

    A job that Slurm restarted may find the lock still held by its dying predecessor: it waits `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with open(folder / name, "w", encoding="utf-8") as file:
        while True:
            try:
                flock(file, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UserError(f"{folder}: another process {doing}; wait for it or stop it") from None
                print(f"{folder} is locked by another process, waiting for it", file=sys.stderr, flush=True)
                time.sleep(5)
        yield
