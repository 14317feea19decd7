"""The three inputs of the student (paper Sec. 4.4 and 4.5): pure noise, noised real images, its own earlier steps."""

import torch
from torch import Tensor

from dmd2.experiment.method_config import Generator
from dmd2.method.batches import Batch
from dmd2.method.passes import Given
from dmd2.method.samplers import Noise, times_like, walk
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.schedules import add_noise, spread, step_index


def student_input(student: Denoiser, batch: Batch, cfg: Generator, shape: tuple[int, ...]) -> Given:
    """Network input ``x_t`` ``(B, *shape)`` and times ``t`` ``(B,)`` of this iteration's student pass."""
    times = student.schedule.step_times(cfg.steps, cfg.time)
    z = batch.draws.normal("student/noise", shape)
    if cfg.input == "noise":
        return _start(student, z, times[0])
    if cfg.input == "noised_real":
        return _noised_real(student, batch, times, z)
    return _backward_simulation(student, batch, times, z, cfg.sampler)


def _start(student: Denoiser, z: Tensor, time: float) -> Given:
    t = times_like(time, z)
    return student.schedule.pure_noise(z, t), t


def _noised_real(student: Denoiser, batch: Batch, times: list[float], z: Tensor) -> Given:
    """Each sample draws its own step; at the first one the input is pure noise (ablation "w/o backward simulation")."""
    assert batch.source is not None
    step = batch.draws.integers("student/step", 0, len(times) - 1)
    t = student.schedule.time(step_index(step, len(times))).float().masked_fill(step == 0, times[0])
    noised = add_noise(student.schedule, batch.source, z, t)
    return torch.where(spread(step == 0, z), student.schedule.pure_noise(z, t), noised), t


@torch.no_grad()
def _backward_simulation(student: Denoiser, batch: Batch, times: list[float], z: Tensor, sampler: str) -> Given:
    """Run the student's own sampler up to a step drawn once for the whole global batch, the last time with noise ``z``.

    Its starting and intermediate noise is independent of ``z`` and of each other (intended by the authors). Euler's
    sampler starts from ``z``.
    """
    draws, shape = batch.draws, tuple(z.shape[1:])
    k = draws.shared_integer("student/step", 0, len(times) - 1)
    if k == 0:
        return _start(student, z, times[0])
    t, walked = times_like(times[k], z), times[: k + 1]
    if sampler == "euler":
        return walk(student, z, walked, batch.cond, None), t
    start, _ = _start(student, draws.normal("simulation/start", shape), times[0])
    noise: Noise = lambda i: z if i + 1 == k else draws.normal(f"simulation/{i}", shape)  # noqa: E731
    return walk(student, start, walked, batch.cond, noise), t
