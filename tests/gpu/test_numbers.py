"""Losses and gradients of one iteration in float32, TF32 and bf16 against our own networks in float64 on the CPU."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from dmd2.core.precision import float32_products
from dmd2.core.rng import Draws
from dmd2.data.sets import TensorSet
from dmd2.experiment.config import RunConfig
from dmd2.method.batches import Batch, Batches
from dmd2.method.step import Models, critic_loss, frozen, student_loss
from dmd2.method.student_input import student_input
from dmd2.networks.head import Head
from dmd2.training.optimiser import Optimiser
from dmd2.training.teachers import wrap
from tests import tiny

CPU = torch.device("cpu")
# Largest error of losses, relative, and of all gradients of a network together, relative to their length. Measured on a
# CPU: fp32 4e-8 and 9e-7, bf16 and bf16-body 2e-3 and 2e-2. TF32 (there float32) has three bits of mantissa more than bf16.
BOUNDS = {"fp32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "bf16": (1e-2, 1e-1), "bf16-body": (1e-2, 1e-1)}


@dataclass(frozen=True)
class HostDraws(Draws):
    """The CPU's draws on whatever device."""

    dtype: torch.dtype = torch.float32

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        draws = Draws(self.seed, self.iteration, self.total, self.start, self.stop)
        with mock.patch("torch.randn", _single_randn):
            return draws.normal(name, shape).to(self.device, self.dtype)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        draws = Draws(self.seed, self.iteration, self.total, self.start, self.stop)
        return draws.integers(name, low, high).to(self.device)


def _single_randn(*size: int, real=torch.randn, **options) -> Tensor:
    return real(*size, dtype=torch.float32, **options)


def numbers(kind: str, precision: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses by name, and the gradients of student and critic with head, all in float64 on the CPU."""
    cfg: RunConfig = tiny.config(kind, gan__lambda_g=0.1, gan__r1_weight=1.0, regression__weight=0.5, optim__batch=8)
    form = tiny.KINDS[kind][0]
    student, teacher, critic = (
        wrap(tiny.network(kind, seed), form, precision).to(device, dtype).train() for seed in (2, 1, 3)
    )
    if precision == "bf16-body":
        torch.nn.Module.to(teacher.network, torch.bfloat16)
        for denoiser in (student, critic):
            denoiser.hold_lowered()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        head = Head(16, tiny.SIZE // 2).to(device, dtype)
    optimisers = (Optimiser(modules, cfg.optim, 1e-3) for modules in ([student], [critic, head]))
    models = Models(
        student, teacher.eval().requires_grad_(False), critic, head, *optimisers, distance=torch.nn.functional.mse_loss
    )
    real = TensorSet(tiny.tensors(kind, 32, seed=9))
    (batch,) = _batch(cfg, real, device, dtype)
    logs: dict[str, Tensor] = {}
    x_t, t = student_input(student, batch, cfg.generator, cfg.data.shape)
    x = student(x_t, t, batch.cond).to(dtype)
    student_loss(models, tiny.GIVEN, x, batch, cfg, logs).backward()
    with frozen():
        critic_loss(models, tiny.GIVEN[1], x.detach(), batch, cfg, logs).backward()
    for denoiser in (student, critic):
        denoiser.hand_over()
    names = ("dm/g_abs", "student/gan", "student/regression", "critic/denoise", "critic/gan")
    found = {name: logs[name].double().cpu() for name in names}
    for name, modules in {"student": [student], "critic": [critic, head]}.items():
        parts = [p.grad.double().cpu().flatten() for m in modules for p in m.parameters() if p.grad is not None]
        found[f"gradient of {name}"] = torch.cat(parts)
    return found


def _batch(cfg: RunConfig, real: TensorSet, device: torch.device, dtype: torch.dtype) -> list[Batch]:
    batches = Batches(cfg, 0, device, 1 << 30, real, real)
    return [batches.slice_of(HostDraws(0, 0, cfg.optim.batch, 0, cfg.optim.batch, device, dtype))]


def in_float64(kind: str) -> dict[str, Tensor]:
    """The same with every cast to float32 a cast to float64."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        return numbers(kind, "fp32", CPU, torch.float64)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kind", ["edm-attention", "eps-text"])
def test_losses_and_gradients_are_those_of_float64(kind: str, precision: str, real_device: torch.device) -> None:
    exact = in_float64(kind)
    with float32_products(precision):
        found = numbers(kind, precision, real_device, torch.float32)
    apart = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    print({name: f"{error:.2g}" for name, error in apart.items()})
    losses, gradients = BOUNDS[precision]
    assert {name: e for name, e in apart.items() if e > (gradients if name.startswith("gradient") else losses)} == {}
