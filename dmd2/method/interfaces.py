"""What the step asks of its surroundings, so that the method depends on no training loop."""

from typing import Any, Protocol

from torch import Tensor, nn


class Optimiser(Protocol):
    """Updates the parameters of one or more networks from the gradients that they hold."""

    parameters: list[nn.Parameter]

    def step(self, it: int) -> Tensor:
        """Update at iteration `it` and clear the gradients; returns their norm before clipping."""

    def spans(self) -> dict[str, tuple[int, int]]:
        """Rows that this process owns of each sharded parameter, by its number."""

    def state_dict(self) -> dict[str, Any]:
        """Moments, of sharded parameters those of the rows that this process owns."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
