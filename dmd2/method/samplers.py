"""Samplers over an explicit list of times. Training's backward simulation and evaluation share `few_step`."""

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from dmd2.experiment.eval_config import Sampler
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser, EdmDenoiser, guide
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import BETA_END, BETA_START, LEVELS, add_noise, move, spread

Noise = Callable[[int], Tensor]  # fresh unit noise for step i, shaped like the images


def times_like(t: float, x: Tensor) -> Tensor:
    """One time for every sample of ``x``: float32 ``(B,)``."""
    return torch.full((len(x),), t, device=x.device)


def few_step(student: Denoiser, z: Tensor, times: list[float], cond: Condition, noise: Noise | None) -> Tensor:
    """The student's sampler: predict x0, go to the next time as `walk` does, repeat (paper Sec. 4.4).

    Args:
        z: network input at ``times[0]`` (see `Schedule.pure_noise`), ``(B, C, H, W)``. times: noisiest first.
    Returns:
        The last x0 prediction, in the dtype of ``z``.
    """
    z = walk(student, z, times, cond, noise)
    return student(z, times_like(times[-1], z), cond).to(z.dtype)


def walk(student: Denoiser, z: Tensor, times: list[float], cond: Condition, noise: Noise | None) -> Tensor:
    """The student's input at the last of `times`, after its steps at the others.

    A step adds fresh noise to the predicted x0. Without `noise` it is deterministic: Euler's on a flow.
    """
    for i, (t, following) in enumerate(pairwise(times)):
        x = student(z, times_like(t, z), cond).to(z.dtype)
        if noise is None:
            z = move(student.schedule, z, x, times_like(t, z), times_like(following, z))
        else:
            z = add_noise(student.schedule, x, noise(i), times_like(following, z))
    return z


def heun(
    denoiser: EdmDenoiser | FlowDenoiser,
    z: Tensor,
    cond: Condition,
    null: Condition | None,
    spec: Sampler,
    noise: Noise,
) -> Tensor:
    """EDM's second-order sampler, float64 (Karras et al. 2022, Algorithm 1; Algorithm 2 when ``churn > 0``).

    On a flow ``(x - D(x)) / sigma`` is the velocity, and the steps are those of its own levels; ``euler`` leaves the
    correction out. ``z`` is unit noise ``(B, C, H, W)``; float32 images are returned.
    """
    sigmas = denoiser.schedule.solver_sigmas(spec.steps)

    def slope(x: Tensor, sigma: float) -> Tensor:
        x0 = guide(denoiser, x.float(), times_like(sigma, x), cond, null, spec.guidance)
        return (x - x0.double()) / sigma

    x = z.double() * sigmas[0]
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        gamma = min(spec.churn / spec.steps, sqrt(2) - 1) if spec.s_min <= sigma <= spec.s_max else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = x + sqrt(raised**2 - sigma**2) * spec.s_noise * noise(i).double()
        d = slope(x, raised)
        step = x + (following - raised) * d
        if following > 0 and spec.solver == "heun":
            step = x + (following - raised) * (d + slope(step, following)) / 2
        x = step
    return x.float()


def vp_solver(
    denoiser: Denoiser, z: Tensor, cond: Condition, null: Condition | None, spec: Sampler, noise: Noise
) -> Tensor:
    """DDIM, PNDM (Stable Diffusion's settings), DDPM or Euler of diffusers; ``z`` is unit noise.

    DDPM is DDIM with eta 1 (Song et al. 2021, Sec. 4.1) that ends without noise, where DDIM with Stable Diffusion's
    settings ends at the first level's sigma, 0.029. Diffusers' scheduler of that name can be given no noise.
    """
    betas = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
    options = {"num_train_timesteps": LEVELS, "steps_offset": 1, **betas}
    ddpm = spec.solver == "ddpm"
    if spec.solver in ("ddim", "ddpm"):
        scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=ddpm)
    elif spec.solver == "pndm":
        scheduler = PNDMScheduler(**options, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        scheduler = EulerDiscreteScheduler(**options, timestep_spacing=spec.spacing)
    eta = 1.0 if ddpm else spec.eta
    scheduler.set_timesteps(spec.steps)  # they stay on the host, which would wait for the device to read them back
    x = z * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        time = times_like(float(t), z)
        x0 = guide(denoiser, scaled, time, cond, null, spec.guidance)
        alpha, sigma = denoiser.schedule.alpha_sigma(time, torch.float64)
        eps = ((scaled - spread(alpha, z) * x0) / spread(sigma, z)).to(z.dtype)
        extra = {"eta": eta, "variance_noise": noise(i)} if eta > 0 else {}
        x = scheduler.step(eps, t, x, **extra).prev_sample
    return x


def teacher_sample(
    denoiser: Denoiser, z: Tensor, cond: Condition, null: Condition | None, spec: Sampler, noise: Noise
) -> Tensor:
    """Images of the teacher from unit noise ``z`` by the sampler that `spec` names."""
    with torch.no_grad():
        if isinstance(denoiser, EdmDenoiser | FlowDenoiser):
            return heun(denoiser, z, cond, null, spec, noise)
        return vp_solver(denoiser, z, cond, null, spec, noise)
