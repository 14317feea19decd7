"""Noise schedules: the index grid of 1000 levels that training draws from, and what each level means.

A *time* names a level: a sigma for Karras and for flows, an integer step for VP. Index 0 is the least noise.
"""

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

LEVELS = 1000
SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5  # Karras et al. 2022, Table 1
BETA_START, BETA_END = 0.00085, 0.012  # SD 1.5 and SDXL, "scaled linear"

Weighting = Literal["edm", "eps", "x0", "v"]


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample values ``(B,)`` so that they broadcast over ``like`` ``(B, ...)``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Schedule:
    """Forward process ``x_t = alpha_t x + sigma_t n`` on a grid of `LEVELS` indices."""

    def __init__(self) -> None:
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, grid: Tensor) -> Tensor:
        """The schedule's `grid` on `device`, copied once: a copy in every pass would make a GPU wait."""
        if device not in self._copies:
            self._copies[device] = grid.to(device)
        return self._copies[device]

    def time(self, index: Tensor) -> Tensor:
        """Network time of grid indices, shape kept."""
        raise NotImplementedError

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times ``t`` ``(B,)``."""
        raise NotImplementedError

    def pure_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """The student's starting input made of unit noise alone (algorithm: generator input, one step)."""
        raise NotImplementedError

    def index_of_time(self, t: Tensor) -> Tensor:
        """Index of the noisiest level that is not noisier than times ``t`` ``(B,)``, int64; 0 if all are."""
        grid = self.time(torch.arange(LEVELS, device=t.device))
        return (torch.searchsorted(grid, t.to(grid.dtype), right=True) - 1).clamp(min=0)

    def step_times(self, steps: int, first: float) -> list[float]:
        """Times of an n-step student, noisiest first.

        Args:
            first: 80.0 of the published runs with EDM; 999, and 399 for one-step SDXL; 1.0 on a flow.
        """
        later = torch.tensor(step_indices(steps)[1:], dtype=torch.long)
        return [first, *map(float, self.time(later).tolist())]


def add_noise(schedule: Schedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Forward process ``alpha_t x + sigma_t n`` in the dtype of ``x``; ``t`` is ``(B,)``."""
    alpha, sigma = schedule.alpha_sigma(t, x.dtype)
    return spread(alpha, x) * x + spread(sigma, x) * noise


def move(schedule: Schedule, x_t: Tensor, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """Samples at times ``to`` ``(B,)`` by one deterministic step from ``x_t`` at ``t``, where ``x`` is predicted.

    DDIM without noise (Song et al. 2021, Eq. 12), which on a flow is Euler's step along the velocity.
    """
    (alpha, sigma), (alpha_to, sigma_to) = (schedule.alpha_sigma(time, torch.float64) for time in (t, to))
    ratio = sigma_to / sigma
    moved = spread(ratio, x) * x_t.double() + spread(alpha_to - ratio * alpha, x) * x.double()
    return moved.to(x_t.dtype)


def loss_weight(schedule: Schedule, t: Tensor, kind: Weighting) -> Tensor:
    """Weight of a squared x0 error at times ``t`` ``(B,)``, float64 ``(B,)``.

    ``edm`` is 1/sigma^2 + 1/sigma_data^2; ``eps`` is (alpha/sigma)^2, so that it is the noise error; ``x0`` is 1; ``v``
    is 1/sigma^2, on a flow the error of the velocity, with which flow-matching teachers are trained.
    """
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    if kind == "edm":
        return 1 / sigma**2 + 1 / SIGMA_DATA**2
    if kind == "eps":
        return (alpha / sigma) ** 2
    if kind == "v":
        return 1 / sigma**2
    return torch.ones_like(sigma)


def logit_normal(normal: Tensor, moments: tuple[float, float]) -> Tensor:
    """Levels in (0, 1) of standard normal draws: their logits have these `moments`, mean and SD (Esser et al. 2024)."""
    mean, std = moments
    return (normal * std + mean).sigmoid()


def index_of_fraction(u: Tensor) -> Tensor:
    """Grid index of levels `u` in [0, 1], the least noise first."""
    return (LEVELS * u).long().clamp(max=LEVELS - 1)


def step_indices(steps: int) -> list[int]:
    """Grid indices of an n-step student: 999 downwards in strides of ``1000 // n`` (n = 4: 999, 749, 499, 249)."""
    return [step_index(k, steps) for k in range(steps)]


Step = TypeVar("Step", int, Tensor)


def step_index(k: Step, steps: int) -> Step:
    """Grid index of step `k` (a number or a tensor of them) of an n-step student."""
    return LEVELS - 1 - k * (LEVELS // steps)


def karras_sigmas(count: int) -> Tensor:
    """``count`` sigmas from `SIGMA_MIN` to `SIGMA_MAX`, float64 (Karras et al. 2022, Eq. 5, ascending)."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    return (low + ramp * (high - low)) ** RHO


class KarrasSchedule(Schedule):
    """``x_t = x + sigma n``; the time is sigma. Uniform indices on this grid are DMD2's training distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas = karras_sigmas(LEVELS).float()

    def time(self, index: Tensor) -> Tensor:
        """Sigma of each index, float32."""
        return self.on(index.device, self.sigmas)[index]

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(1, sigma)``."""
        return torch.ones_like(t, dtype=dtype), t.to(dtype)

    def pure_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """``sigma * z``, the one-step input ``80 z``."""
        return spread(t, noise) * noise

    def solver_sigmas(self, steps: int) -> list[float]:
        """Levels of a solver of `steps` steps, noisiest first, and 0 at the end."""
        return [*karras_sigmas(steps).flip(0).tolist(), 0.0]


class VPSchedule(Schedule):
    """``x_t = sqrt(abar) x + sqrt(1 - abar) n`` with Stable Diffusion's betas; the time is the integer step."""

    def __init__(self) -> None:
        betas = torch.linspace(math.sqrt(BETA_START), math.sqrt(BETA_END), LEVELS, dtype=torch.float64) ** 2
        super().__init__()
        self.abar = torch.cumprod(1 - betas, 0)

    def time(self, index: Tensor) -> Tensor:
        """The index itself."""
        return index

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(sqrt(abar_t), sqrt(1 - abar_t))``."""
        abar = self.on(t.device, self.abar)[t.long()]
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)

    def pure_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """Unit noise as it is: neither the small alpha term nor sigma is applied (DMD2's convention)."""
        return noise


def shifted(u: Tensor, shift: float) -> Tensor:
    """Sigmas of evenly spaced levels `u` in [0, 1] (Esser et al. 2024, Sec. 5.3.2); two shifts multiply."""
    return shift * u / (1 + (shift - 1) * u)


def shift_of_tokens(tokens: int) -> float:
    """FLUX's shift for a number of image tokens: ``exp(mu)``, with mu from 0.5 at 256 to 1.15 at 4096 on a line."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


class FlowSchedule(Schedule):
    """Rectified flow: ``x_t = (1 - sigma) x + sigma n``; the time is sigma, from 0, the data, to 1, pure noise.

    The grid is that of diffusers' ``FlowMatchEulerDiscreteScheduler(shift=shift)``, ascending; it has no level 0.
    """

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        self.shift, self.sigmas = shift, shifted(torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS, shift)

    def time(self, index: Tensor) -> Tensor:
        """Sigma of each index, float32."""
        return self.on(index.device, self.sigmas)[index].float()

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(1 - sigma, sigma)``."""
        sigma = t.double()
        return (1 - sigma).to(dtype), sigma.to(dtype)

    def pure_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """Unit noise as it is: at sigma 1, where students begin, nothing of the data is left."""
        return noise

    def solver_sigmas(self, steps: int) -> list[float]:
        """Levels of a solver of `steps` steps, from 1 downwards, and 0 at the end."""
        return [*shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps, self.shift).tolist(), 0.0]
