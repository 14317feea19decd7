"""One iteration of DMD2: the algorithm box (paper Algorithm 1 and Sec. 4), without logging, devices or files."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmd2.experiment.config import Gan, TrainConfig
from dmd2.method.batches import Batch
from dmd2.method.interfaces import Optimiser
from dmd2.method.losses import (
    denoising_loss,
    discriminator_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    generator_gan_loss,
)
from dmd2.method.student_input import student_input
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser, guide
from dmd2.networks.head import Head
from dmd2.networks.schedules import add_noise, loss_weight, spread

Logs = dict[str, Tensor]
# Whose level and noise the GAN takes under gan.shares_noise: draws are addressed, so an equal name is an equal draw.
SHARED_NOISE = {"gan/generator": "dm", "gan/fake": "critic"}


@dataclass(frozen=True)
class Models:
    """Student G, frozen teacher R, critic K, its GAN head h, and the optimisers of G and of K with h."""

    student: Denoiser
    teacher: Denoiser
    critic: Denoiser
    head: Head | None
    student_optimiser: Optimiser
    critic_optimiser: Optimiser
    null: Condition | None = None  # the unconditional condition of one sample, when the teacher is guided
    distance: Callable[[Tensor, Tensor], Tensor] | None = None  # of the regression, between what the run diffuses


def train_step(m: Models, micro_batches: Iterable[Batch], it: int, cfg: TrainConfig) -> Logs:
    """Iteration `it`: every `ratio`-th updates the student, each the critic on the same images (`Critic.turns`)."""
    logs: Logs = {}
    update_student, update_critic = cfg.critic.turns(it)
    update_critic = update_critic and cfg.trains_critic
    generated: list[tuple[Batch, Tensor]] = []
    for batch in micro_batches:
        x_t, t = student_input(m.student, batch, cfg.generator, cfg.data.shape)
        with torch.set_grad_enabled(update_student):
            x = m.student(x_t, t, batch.cond).float()
        if update_student:
            (batch.share * student_loss(m, x, batch, cfg, logs)).backward()
        generated.append((batch, x.detach()))
    if update_student:
        logs["student/grad_norm"] = m.student_optimiser.step(it)
    if update_critic:
        for batch, x in generated:
            (batch.share * critic_loss(m, x, batch, cfg, logs)).backward()
        logs["critic/grad_norm"] = m.critic_optimiser.step(it)
    return logs


def student_loss(m: Models, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    """``w_DM L_DM + lambda_G L_G + lambda_reg L_reg`` of student images ``x``; a term of weight 0 is not computed."""
    with frozen(m.critic, m.head):
        terms: dict[str, Callable[[], Tensor]] = {
            "dm": lambda: _distribution_matching(m, x, batch, cfg, logs),
            "gan": lambda: generator_gan_loss(_logits(m, x, batch.cond, batch, "gan/generator", cfg.gan)),
            "regression": lambda: _regression(m, batch, cfg),
        }
        weights = {"dm": cfg.dm.weight, "gan": cfg.gan.lambda_g, "regression": cfg.regression.weight}
        level = {"student/mean": x.detach().mean()} if cfg.data.latents else {"student/brightness": brightness(x)}
        _add(logs, batch.share, {**level, "student/std": x.detach().std()})
        return weighted_sum(terms, weights, "student", batch.share, logs)


def critic_loss(m: Models, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    """``L_K + lambda_D L_D`` on detached student images ``x``: one loss, one optimiser for critic and head."""
    terms: dict[str, Callable[[], Tensor]] = {
        "denoise": lambda: _critic_denoising(m, x, batch, cfg),
        "gan": lambda: _discriminator(m, x, batch, cfg, logs),
    }
    weights = {"denoise": cfg.critic.denoise_weight, "gan": cfg.gan.lambda_d}
    return weighted_sum(terms, weights, "critic", batch.share, logs)


def weighted_sum(
    terms: dict[str, Callable[[], Tensor]], weights: dict[str, float], who: str, share: float, logs: Logs
) -> Tensor:
    """Sum of the terms with a non-zero weight; the others are never evaluated."""
    values = {name: term() for name, term in terms.items() if weights[name] != 0}
    _add(logs, share, {f"{who}/{name}": value.detach() for name, value in values.items()})
    return torch.stack([weights[name] * value for name, value in values.items()]).sum()


def _distribution_matching(m: Models, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    with torch.no_grad():
        x_t, t = _noised(m.teacher, x, batch, "dm", cfg.dm.index_range)
        null = None if m.null is None else m.null.expand(len(x))
        real = guide(m.teacher, x_t, t, batch.cond, null, cfg.teacher.guidance)
        fake = m.critic(x_t, t, batch.cond)
        factor = spread(m.teacher.schedule.alpha_sigma(t, real.dtype)[0], x) if cfg.dm.alpha_factor else None
        g = distribution_matching_gradient(x, real, fake, cfg.dm.normaliser_eps, factor)
    signals = {"g_abs": g.abs().mean()}
    for name, value in (("g", g), ("real", real), ("fake", fake)):
        signals |= {f"{name}_mean": value.mean(), f"{name}_std": value.std()}
    _add(logs, batch.share, {f"dm/{name}": value.float() for name, value in signals.items()})
    return distribution_matching_loss(x, g)


def _regression(m: Models, batch: Batch, cfg: TrainConfig) -> Tensor:
    """Distance of G(z) to the teacher's image of the same z; the pair batch is independent of the DM batch (DMD)."""
    assert batch.pairs is not None and m.distance is not None
    noise, image, cond = batch.pairs
    t = torch.full((len(noise),), cfg.generator.time, device=noise.device)
    return m.distance(m.student(m.student.schedule.pure_noise(noise, t), t, cond).float(), image)


def _critic_denoising(m: Models, x: Tensor, batch: Batch, cfg: TrainConfig) -> Tensor:
    x_t, t = _noised(m.critic, x, batch, "critic", cfg.critic.index_range)
    return denoising_loss(m.critic(x_t, t, batch.cond), x, loss_weight(m.critic.schedule, t, cfg.critic.weighting))


def _discriminator(m: Models, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    assert batch.real is not None
    real, real_cond = batch.real
    fake_logits = _logits(m, x, batch.cond, batch, "gan/fake", cfg.gan)
    real_logits = _logits(m, real, real_cond, batch, "gan/real", cfg.gan)
    loss = discriminator_loss(fake_logits, real_logits)
    if cfg.gan.r1_weight > 0:
        # Approximate R1: the logit should not change when the real image is perturbed a little (FastGen).
        perturbed = real + cfg.gan.r1_alpha * batch.draws.normal("gan/r1", tuple(real.shape[1:]))
        change = _logits(m, perturbed, real_cond, batch, "gan/real", cfg.gan) - real_logits
        loss = loss + cfg.gan.r1_weight * change.square().mean()
    chance = {"gan/p_real": real_logits.detach().sigmoid().mean(), "gan/p_fake": fake_logits.detach().sigmoid().mean()}
    _add(logs, batch.share, chance)
    return loss


def _logits(m: Models, images: Tensor, cond: Condition, batch: Batch, name: str, cfg: Gan) -> Tensor:
    """Head on the bottleneck of diffused images ("diffusion GAN"); level and noise are drawn per `name`."""
    assert m.head is not None
    if cfg.shares_noise:
        name = SHARED_NOISE.get(name, name)
    network = m.critic if cfg.features_from == "critic" else m.teacher
    if cfg.noise_range is None:
        least = torch.zeros(len(images), dtype=torch.long, device=images.device)
        images_tau, tau = images, network.schedule.time(least)
    else:
        images_tau, tau = _noised(network, images, batch, name, cfg.noise_range)
    return m.head(network.features(images_tau, tau, cond))


def _noised(
    network: Denoiser, images: Tensor, batch: Batch, name: str, index_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Images diffused to a per-sample level of the inclusive index range, and the levels' times."""
    t = network.schedule.time(batch.draws.integers(f"{name}/level", *index_range))
    noise = batch.draws.normal(f"{name}/noise", tuple(images.shape[1:]))
    return add_noise(network.schedule, images, noise, t), t


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Parameters take no gradient inside, while it still flows through them into their input."""
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def brightness(x: Tensor) -> Tensor:
    """Mean of images in [-1, 1] on the 0..1 scale of the paper's Figure 8, clamped as when displayed."""
    return (x.detach().float() / 2 + 0.5).clamp(0, 1).mean()


def _add(logs: Logs, share: float, values: Logs) -> None:
    for name, value in values.items():
        logs[name] = logs.get(name, torch.zeros((), device=value.device)) + share * value.detach()
