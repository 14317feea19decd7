"""Flow-matching transformers seen as denoisers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser, Precision, Rescale
from dmd2.networks.schedules import FlowSchedule, spread
from dmd2.networks.transformers.family import family_of


class FlowDenoiser(Denoiser):
    """Velocity network on the flow schedule: ``x0 = x_t - sigma v``; t is sigma.

    The factor is at most 1, so that float32 does where the VP schedule needs float64. shift: of the grid of levels.
    taps: blocks, in ascending order, after which `features` reads the image tokens; None: the middle one.
    rescale: of guided velocities, see `guidance`. guidance_embed: what a network with a guidance embedder is told.
    """

    kind = FlowSchedule
    schedule: FlowSchedule

    def __init__(
        self,
        network: Any,
        precision: Precision = "fp32",
        shift: float = 1.0,
        taps: Sequence[int] | None = None,
        rescale: Rescale | None = None,
        guidance_embed: float = 3.5,
    ) -> None:
        super().__init__(network, precision)
        self.schedule = FlowSchedule(shift)
        self.rescale = rescale
        self.family = family_of(type(network).__name__)
        self.family.guidance_embed = guidance_embed
        self.taps = [len(self.family.blocks(network)) // 2] if taps is None else taps
        self._call: Any = self.family.velocity

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The sample in the dtype of the weights, and sigma in float32: what the network is told is made of it."""
        return x_t.to(self.dtype), t.float()

    def prediction(self, x_t: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """``x_t - sigma v``, float32."""
        return x_t.float() - spread(t.float(), x_t) * raw

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Image tokens after the blocks `taps` as a grid, float32 ``(B, taps D, H / patch, W / patch)``."""
        sample, sigma = self.network_input(x_t, t)
        with self.autocast(x_t):
            return self.family.features(self.running, sample, sigma, cond.cast(sample.dtype), self.taps).float()

    def bottleneck(self, resolution: int) -> tuple[int, int]:
        """Width and side of the `features` of one tap, of latents of this side: those of the image tokens."""
        return self.family.width(self.network), resolution // self.family.patch(self.network)

    def joined(self, x_t: Tensor, t: Tensor, cond: Condition, predicted: int) -> tuple[Tensor, Tensor]:
        """`forward` of the first `predicted` samples and `features` of the others: two passes, with no block twice."""
        first, rest = cond.parts(predicted)
        return self(x_t[:predicted], t[:predicted], first), self.features(x_t[predicted:], t[predicted:], rest)
