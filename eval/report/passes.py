"""What a training costs in passes of its network, whatever machine it ran on."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from dmd2.core.errors import UserError
from dmd2.experiment.config import RunConfig

Passes = Callable[[Mapping[str, Any]], float | None]


def passes_by_config() -> Passes:
    """A function that says how many forward passes of its network an iteration of a run costs (`Counted.passes`).

    It takes the config of a run and counts equal ones once. None: the config is of another version of the code, or the
    architecture of its teacher is not known here.
    """
    from dmd2.planning.plan import counting  # the help of the command needs no PyTorch

    counted = counting()

    def passes(config: Mapping[str, Any]) -> float | None:
        try:
            return counted(RunConfig.model_validate(config)).passes
        except (UserError, ValidationError):
            return None

    return passes
