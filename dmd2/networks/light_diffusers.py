"""Imports diffusers without what it would load besides: 1 s instead of 5, in every process of a run in pixels."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec

from dmd2.experiment.config import Data

# What diffusers imports where it finds it, for adapters, quantised weights, text encoders and unused noise schedules.
# (accelerate must stay: without it, weights are copied that are now mapped from their file.)
NEEDLESS = ("peft", "scipy", "torchao", "transformers")
TRANSFORMERS = "diffusers.models.transformers"  # imports seventy networks for the one that its UNets name


def light_diffusers(data: Data, adapters: bool = False) -> None:
    """Import diffusers' UNets; to it alone, packages that runs in pixels do not need count as not installed.

    Captions are encoded before, by other processes. Nothing is done for a run in latents or with `adapters` (low-rank
    factors), which needs them, nor where diffusers is imported already.
    """
    if data.latents or adapters or "diffusers" in sys.modules:
        return
    with hidden(*NEEDLESS):
        spec = find_spec(TRANSFORMERS)
        assert spec is not None
        sys.modules[TRANSFORMERS] = module_from_spec(spec)  # not executed: its modules are imported one by one
        from diffusers import UNet2DConditionModel, UNet2DModel  # noqa: F401


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Packages that are not imported yet count as not installed."""
    names = [name for name in packages if name not in sys.modules]
    sys.modules |= dict.fromkeys(names)  # type: ignore[arg-type]  # None: "there is no such module"
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
