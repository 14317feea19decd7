"""One iteration of DMD2: the algorithm box (paper Algorithm 1 and Sec. 4), without logging, devices or files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmd2.experiment.config import TrainConfig
from dmd2.method.batches import Batch
from dmd2.method.interfaces import Models
from dmd2.method.objectives.terms import CRITIC, STUDENT, Term
from dmd2.method.passes import Given, Logs, Turn, evaluate
from dmd2.method.student_input import student_input
from dmd2.networks.denoisers import reached


def train_step(m: Models, micro_batches: Iterable[Batch], it: int, cfg: TrainConfig) -> Logs:
    """Iteration `it`: every `ratio`-th updates the student, each the critic on the same images (`Critic.turns`)."""
    logs: Logs = {}
    update_student, update_critic = cfg.critic.turns(it)
    update_critic = update_critic and cfg.trains_critic
    generated: list[tuple[Batch, Tensor, Tensor]] = []
    for batch in micro_batches:
        x_t, t = student_input(m.student, batch, cfg.generator, cfg.data.shape)
        with torch.set_grad_enabled(update_student):
            x = m.student(x_t, t, batch.cond).float()
        if update_student:
            (batch.share * student_loss(m, (x_t, t), x, batch, cfg, logs)).backward()
        generated.append((batch, t, x.detach()))
    if update_student:
        logs["student/grad_norm"] = m.student_optimiser.step(it)
        if cfg.critic.ida < 1:
            m.critic.approach(m.student, 1 - cfg.critic.ida)
    if update_critic:
        for batch, t, x in generated:
            (batch.share * critic_loss(m, t, x, batch, cfg, logs)).backward()
        logs["critic/grad_norm"] = m.critic_optimiser.step(it)
    return logs


def student_loss(m: Models, given: Given, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    """``w_DM L_DM + lambda_G L_G + lambda_reg L_reg`` of images ``x`` that the student made of what it was `given`.

    No gradient reaches critic and head.
    """
    level = {"student/mean": x.detach().mean()} if cfg.data.latents else {"student/brightness": brightness(x)}
    _add(logs, batch.share, {**level, "student/std": x.detach().std()})
    with frozen(m.critic, m.head):
        return weighted_sum(STUDENT, Turn(m, x, batch, cfg, given[1], given[0]), "student", logs)


def critic_loss(m: Models, t: Tensor, x: Tensor, batch: Batch, cfg: TrainConfig, logs: Logs) -> Tensor:
    """``L_K + lambda_D L_D`` on detached images ``x`` that the student made at times ``t``: one loss, one optimiser."""
    return weighted_sum(CRITIC, Turn(m, x, batch, cfg, t), "critic", logs)


def weighted_sum(terms: Sequence[Term], turn: Turn, who: str, logs: Logs) -> Tensor:
    """Sum of the terms with a non-zero weight; the others draw and compute nothing."""
    weights = {term.name: term.weight(turn.cfg) for term in terms}
    found = evaluate(turn, {term.name: term.objective(turn) for term in terms if weights[term.name] != 0})
    for name, (loss, signals) in found.items():
        _add(logs, turn.batch.share, {**signals, f"{who}/{name}": loss})
    return torch.stack([weights[name] * loss for name, (loss, _) in found.items()]).sum()


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Parameters take no gradient inside, while it still flows through them into their input."""
    given = [reached(module) for module in modules if module is not None]
    parameters = [p for module in given for p in module.parameters() if p.requires_grad]
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
