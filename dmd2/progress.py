"""A progress line every few seconds, readable in a terminal and in a log file alike."""

import sys
import time

from torch import Tensor

INTERVAL = 10.0  # seconds between lines


class Progress:
    """Prints ``name  step/total  rate  ETA  values`` to stderr."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.first = name, total, done
        self.started = self.last = time.monotonic()

    def update(self, step: int, values: dict[str, Tensor]) -> None:
        """Report that `step` of the total are done; prints at most every `INTERVAL` seconds, and at the end."""
        now = time.monotonic()
        if now - self.last < INTERVAL and step != self.total:
            return
        self.last = now
        rate = (step - self.first) / max(now - self.started, 1e-9)
        left = int((self.total - step) / max(rate, 1e-9))
        shown = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        width = len(str(self.total))
        line = f"{self.name}  {step:>{width}}/{self.total}  {rate:.1f} it/s  ETA {left // 60}:{left % 60:02d}  {shown}"
        print(line, file=sys.stderr, flush=True)
