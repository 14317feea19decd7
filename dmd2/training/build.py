"""The networks of a run: student and critic as copies of the teacher, the head, and their optimisers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified
from dmd2.core.rng import stream
from dmd2.data.sets import load_shard
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.method.step import Models
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.head import AnyHead, Head, Heads, PatchHead
from dmd2.networks.lora import add_lora, split
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.optimiser import Optimiser
from dmd2.training.sampling import to_images
from dmd2.training.sharding import load_local, materialise, sharing, span, spans_of
from dmd2.training.teachers import load_teacher, null_condition

Placing = Callable[[str, nn.Module, torch.dtype], None]


def build_models(
    cfg: TrainConfig, seed: int, inputs: Inputs, device: torch.device, place: Placing | None = None
) -> Models:
    """Teacher from its manifest; student and critic as copies of it, or of another run's weights (``init_from``).

    Networks stay mapped from the teacher's file, in its dtype, until `place(name, network, dtype)` gives each memory of
    its own where it is trained, by default on `device`. That comes before the optimisers, which keep references to the
    parameters.
    """
    assert inputs.teacher is not None
    precision = cfg.train.precision
    teacher = load_teacher(inputs.teacher, cfg.teacher.parameterisation, precision, as_stored=True, **cfg.teacher.flow)
    null = null_condition(cfg.data, max(cfg.guidance.values()), teacher.network)
    tap_blocks(teacher, cfg)
    student, critic = (sharing(teacher).train().requires_grad_(True) for _ in range(2))
    if inputs.init is not None:
        _load_student(inputs.init, student)
    if cfg.generator.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(f"{seed}/lora").initial_seed())
            add_lora(student.network, cfg.generator.lora.rank, cfg.generator.lora.alpha)
    head = None
    if cfg.gan.on:
        probe = teacher if cfg.gan.features_from == "teacher" else critic
        head = build_head(probe, cfg, seed, torch.device("cpu"))
    networks: dict[str, nn.Module | None] = {"student": student, "teacher": teacher, "critic": critic, "head": head}
    for name, network in networks.items():
        if network is not None:
            dtype = torch.bfloat16 if name == "teacher" and name in in_bfloat16(cfg) else torch.float32
            if place is not None:
                place(name, network, dtype)
            else:
                materialise(network, device, dtype, own=name != "teacher")
    if inputs.init is not None:
        _load_critic(inputs.init, critic)
    hold_lowered(cfg, student, critic)
    return Models(
        student,
        teacher,
        critic,
        head,
        student_optimiser=Optimiser([student], cfg.optim, cfg.optim.lr),
        critic_optimiser=Optimiser(
            [critic, head], cfg.optim, cfg.optim.lr * cfg.critic.lr_multiplier, clips=cfg.optim.clip_critic
        ),
        null=None if null is None else null.to(device),
        distance=regression_distance(cfg, device) if cfg.needs_pairs else None,
    )


def in_bfloat16(cfg: TrainConfig) -> set[str]:
    """Networks that run with bfloat16 weights; low-rank factors and what they are added to stay float32."""
    if cfg.train.precision == "bf16-body":
        return {"teacher", "critic"} | ({"student"} if cfg.generator.lora is None else set())
    text = cfg.teacher.parameterisation == "eps"
    return {"teacher"} if text and cfg.train.precision.startswith("bf16") else set()


def hold_lowered(cfg: TrainConfig, student: Denoiser, critic: Denoiser) -> None:
    """Give the networks that run with bfloat16 weights their copies; of sharded ones FSDP gathers such copies."""
    for name, denoiser in {"student": student, "critic": critic}.items():
        if name in in_bfloat16(cfg) and span(next(denoiser.parameters())) is None:
            denoiser.hold_lowered()


def regression_distance(cfg: TrainConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The regression's ``l2``, or ``lpips`` (weights from data/weights) of images, to which latents are decoded."""
    if cfg.regression.distance == "l2":
        return nn.functional.mse_loss
    from dmd2.networks.lpips import Lpips

    images, lpips = to_images(cfg, device, cfg.regression.decoder), Lpips().to(device)

    def distance(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = images(target)
        return lpips(images(x), wanted)

    return distance


def tap_blocks(denoiser: Denoiser, cfg: TrainConfig) -> None:
    """Let a transformer give the features that the GAN of a run sees, and so its copies that are made after this."""
    if isinstance(denoiser, FlowDenoiser) and cfg.gan.taps:
        denoiser.taps = cfg.gan.taps


def build_head(denoiser: Denoiser, cfg: TrainConfig, seed: int, device: torch.device) -> AnyHead:
    """A head that fits the denoiser's bottleneck, or one for each tap; initial weights depend on `seed` only."""
    width, resolution = denoiser.bottleneck(cfg.data.resolution)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"{seed}/head").initial_seed())
        heads = [Head(width, resolution) if cfg.gan.head == "single" else PatchHead(width) for _ in cfg.gan.taps or [0]]
    return (heads[0] if len(heads) == 1 else Heads(heads)).to(device)


def _load_student(train_json: Path, student: Denoiser) -> None:
    """Take the weights of a run's last snapshot, mapped from its file; the paper's second stage takes no more."""
    entry = read_json(train_json)["files"][-1]
    weights, _ = split(load_shard(verified(train_json.parent, entry)))
    student.network.load_state_dict(weights, assign=True)


def _load_critic(train_json: Path, critic: Denoiser) -> None:
    """Copy the critic of the newest checkpoint of a run into `critic`; nothing else is read of that checkpoint."""
    checkpoints = Checkpoints.of(train_json.parent, read_json(train_json)["key"])
    step = checkpoints.newest_good()
    if step is None:
        raise UserError(f"train.init_from: {train_json.parent} has no good checkpoint to take the critic from")
    load_local(critic, checkpoints.load(step, spans_of(critic, "critic"), only="critic/")["critic"])
