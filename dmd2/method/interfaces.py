"""What the step works on: the networks, and the optimisers as far as the method uses them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.head import AnyHead


class Optimiser(Protocol):
    """Updates the parameters of one or more networks from the gradients that they hold."""

    parameters: list[nn.Parameter]

    def hold_rate_on_device(self) -> None:
        """Keep the learning rate in a tensor that `step` leaves alone; from now on `set_rate` comes before it."""

    def set_rate(self, it: int) -> None:
        """Set the learning rate of iteration `it`."""

    def step(self, it: int) -> Tensor:
        """Update at iteration `it` and clear the gradients; returns their norm before clipping."""

    def overlap(self, passes: int) -> None:
        """Prepare for `passes` backward passes before an update, and sum gradients over processes in the last one."""

    def spans(self) -> dict[str, tuple[int, int]]:
        """Rows that this process owns of each sharded parameter, by its number."""

    def state_dict(self) -> dict[str, Any]:
        """Moments, of sharded parameters those of the rows that this process owns."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""


@dataclass(frozen=True)
class Models:
    """Student G, frozen teacher R, critic K, its GAN head h, and the optimisers of G and of K with h."""

    student: Denoiser
    teacher: Denoiser
    critic: Denoiser
    head: AnyHead | None
    student_optimiser: Optimiser
    critic_optimiser: Optimiser
    null: Condition | None = None  # the unconditional condition of one sample, when the teacher is guided
    distance: Callable[[Tensor, Tensor], Tensor] | None = None  # of the regression, between what the run diffuses
