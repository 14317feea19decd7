"""Denoisers whose output is known, so that samplers and losses can be checked without a network."""

import numpy as np
import torch
from torch import Tensor, nn

from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import EdmDenoiser, EpsDenoiser
from dmd2.networks.schedules import spread
from tests import reference

NO_CONDITION = Condition()


class LinearEdm(EdmDenoiser):
    """EDM preconditioning around a body that returns `output` whatever it is fed."""

    def __init__(self, output: Tensor | float = 0.0) -> None:
        super().__init__(nn.Identity())
        self.output = output

    def body(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.zeros_like(x_t) + self.output


class LinearEps(EpsDenoiser):
    """A noise predictor that returns `output`, or ``function(x_t, t)`` of arrays."""

    def __init__(self, output: Tensor | float = 0.0) -> None:
        super().__init__(nn.Identity())
        self.output = output

    def body(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.zeros_like(x_t) + self.output


class MixtureEdm(EdmDenoiser):
    """The exact denoiser of the two-Gaussian pixels of `reference.mixture_mean`; float64 out. Counts its calls."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.times.append(float(t[0]))
        sigma = spread(t, x_t).double().numpy()
        return torch.from_numpy(reference.mixture_mean(x_t.double().numpy(), np.ones_like(sigma), sigma))


class MixtureEps(EpsDenoiser):
    """The exact noise prediction of the same pixels on the VP schedule. Counts its calls."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.times: list[int] = []

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t

    def body(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.times.append(int(t[0]))
        assert len(set(t.tolist())) == 1
        return torch.from_numpy(reference.mixture_eps(x_t.double().numpy(), int(t[0])))


def arrays(seed: int, *shape: int) -> np.ndarray:
    """Reproducible standard normal values that float32 represents exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def tensor(values: np.ndarray) -> Tensor:
    """The same values as a float32 tensor."""
    return torch.from_numpy(values).float()
