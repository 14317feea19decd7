"""Tiny real networks, configs, batches and models: everything a training iteration needs in a few milliseconds."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from dmd2.core.files import listing, write_json
from dmd2.data.sets import TensorSet, save_shard
from dmd2.experiment.config import RunConfig, Teacher
from dmd2.method.batches import Batch, Batches
from dmd2.method.step import Models
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.head import Head
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.optimiser import Optimiser
from dmd2.training.teachers import wrap

SIZE, CLASSES, TOKENS, TEXT_WIDTH, POOLED = 8, 4, 5, 8, 6
BODY = {"sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
PIXELS = {**BODY, "in_channels": 1, "out_channels": 1, "num_class_embeds": CLASSES + 1}
LATENTS = {**BODY, "in_channels": 4, "out_channels": 4, "attention_head_dim": 2}
CROSS = {
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
SIZES = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 6 * 4 + POOLED, "transformer_layers_per_block": (1, 2),
}  # fmt: skip
ATTENTION = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "attn_norm_num_groups": 4,
    "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
# Parameterisation and network of every kind of conditioning.
KINDS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "edm": ("edm", UNet2DModel, {**PIXELS, **PLAIN, "resnet_time_scale_shift": "scale_shift", "add_attention": False}),
    "edm-attention": ("edm", UNet2DModel, {**PIXELS, **ATTENTION}),
    "edm-unlabelled": ("edm", UNet2DModel, {**PIXELS, **PLAIN, "num_class_embeds": None}),
    "eps-labels": ("eps", UNet2DConditionModel,
                   {**LATENTS, **PLAIN, "mid_block_type": "UNetMidBlock2D", "num_class_embeds": CLASSES + 1}),
    "eps-text": ("eps", UNet2DConditionModel, {**LATENTS, **CROSS}),
    "flow-sd3": ("flow", SD3Transformer2DModel, {
        "sample_size": SIZE, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": CLASSES + 1,
        "caption_projection_dim": 16, "pooled_projection_dim": CLASSES + 1, "pos_embed_max_size": 4}),
    "eps-sdxl": ("eps", UNet2DConditionModel, {**LATENTS, **CROSS, **SIZES}),
}  # fmt: skip


def network(kind: str, seed: int) -> UNet2DModel | UNet2DConditionModel:
    """A randomly initialised network; its norms and biases are randomised too, so that no path is hidden by a zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = KINDS[kind][1](**KINDS[kind][2])
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def denoiser(kind: str, seed: int = 0) -> Denoiser:
    """The network seen as a denoiser."""
    return wrap(network(kind, seed), KINDS[kind][0])


def channels(kind: str) -> int:
    """Channels of the diffused tensor."""
    return KINDS[kind][2]["in_channels"]


def condition(kind: str, count: int, seed: int = 0) -> Condition:
    """A random condition of `count` samples for that kind of network."""
    return TensorSet(tensors(kind, count, seed)).condition(torch.arange(count))


def tensors(kind: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Images (or latents) with their conditions, and noise: enough for a real set and for a pair set."""
    g = torch.Generator().manual_seed(seed)
    shape = (count, channels(kind), SIZE, SIZE)
    values = {"images": torch.randn(shape, generator=g) / 2, "noise": torch.randn(shape, generator=g)}
    if kind in ("eps-text", "eps-sdxl"):
        values["text"] = torch.randn(count, TOKENS, TEXT_WIDTH, generator=g)
    if kind == "eps-sdxl":
        values["pooled"] = torch.randn(count, POOLED, generator=g)
        values["time_ids"] = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(count, 1)
    if kind in ("edm", "edm-attention", "eps-labels", "flow-sd3"):
        values["labels"] = torch.randint(CLASSES, (count,), generator=g)
    return values


def teacher(folder: Path, kind: str = "edm", name: str = "t") -> Path:
    """Manifest of a teacher that lies in `folder`, with weights of its own."""
    network(kind, seed=5).save_pretrained(folder / "unet", safe_serialization=True)
    return adopt_teacher(Teacher(name=name, parameterisation=KINDS[kind][0], guidance=1.0), folder)


def real_set(manifest: Path, kind: str = "edm", rows: dict[str, Tensor] | None = None) -> Path:
    """A set of these rows, or of 32 that are drawn, in one shard beside its `manifest`."""
    shard = manifest.with_suffix(".safetensors")
    save_shard(shard, rows or tensors(kind, 32))
    write_json(manifest, {"files": listing([shard], manifest.parent)})
    return manifest


def null(kind: str) -> Condition:
    """Unconditional condition of one sample: the extra class, or zeros for text."""
    one = condition(kind, 1)
    if one.labels is not None:
        return Condition(labels=torch.tensor([CLASSES]))
    pooled = None if one.pooled is None else torch.zeros_like(one.pooled)
    return Condition(text=None if one.text is None else one.text * 0, pooled=pooled, time_ids=one.time_ids)


TEXT = {
    "pipeline": {"name": "tiny"},
    "latents": False,
}  # four channels of "images": there is no autoencoder to decode by


def put(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested values with dotted keys set."""
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


def values(kind: str = "edm", **changes: Any) -> dict[str, Any]:
    """A complete run for that kind of network: distribution matching and GAN on, ratio 5, batch 4, no warm-up.

    Keys of `changes` have ``__`` for the dot: ``values(gan__lambda_g=0.0)``.
    """
    form = KINDS[kind][0]
    solver = {"solver": {"edm": "heun", "eps": "ddim", "flow": "euler"}[form], "steps": 4}
    text = kind in ("eps-text", "eps-sdxl")
    classes = 0 if text or kind == "edm-unlabelled" else CLASSES
    data = {"name": "tiny", "source": {"kind": "latents"}, "resolution": SIZE, "channels": channels(kind)}
    made = {
        "data": {**data, "classes": classes, **({"text": TEXT} if text else {})},
        "teacher": {"name": "tiny", "parameterisation": form, "guidance": 1.0},
        "generator": {"input": "noise", "steps": 1, "time": {"edm": 80.0, "eps": 999.0, "flow": 1.0}[form]},
        "dm": {"weight": 1.0, "index_range": [20, 980], "normaliser_eps": 0.0, "alpha_factor": False},
        "critic": {"ratio": 5, "denoise_weight": 1.0, "weighting": "v" if form == "flow" else form, "lr_multiplier": 1.0, "shares_iteration": True},
        "gan": {"lambda_g": 3e-3, "lambda_d": 1e-2, "features_from": "critic", "noise_range": [0, 999],
                "r1_weight": 0.0, "r1_alpha": 0.1},
        "regression": {"weight": 0.0, "distance": "l2", "pairs": {"count": 16, "sampler": solver, "shards": 1}},
        "optim": {"lr": 1e-3, "batch": 4, "warmup": 0, "ticks_per_iteration": 1, "clip": 10.0, "weight_decay": 0.01,
                  "betas": [0.9, 0.999], "ema": None},
        "train": {"steps": 20, "precision": "fp32", "init_from": None, "snapshot_every": 10, "checkpoint_every": 10,
                  "log_every": 10},
        "eval": {"metrics": ["fd"], "detector": "lite0-320@32", "reference": "tiny", "images": 8, "draws": 1, "batch": 4,
                 "labels": "cyclic", "rounding": "round", "teacher_samplers": {"ode": solver}},
    }  # fmt: skip
    return put(deepcopy(made), {key.replace("__", "."): value for key, value in changes.items()})


def config(kind: str = "edm", **changes: Any) -> RunConfig:
    """The config of `values`."""
    return RunConfig.model_validate(values(kind, **changes))


def models(kind: str, cfg: RunConfig, distance: Any = None) -> Models:
    """Teacher, student and critic with different weights (a student equal to its teacher has no gradient), and a head."""
    teacher = denoiser(kind, seed=1).eval().requires_grad_(False)
    student, critic = denoiser(kind, seed=2).train(), denoiser(kind, seed=3).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        head = Head(16, SIZE // 2) if cfg.gan.on else None
    return Models(
        student, teacher, critic, head,
        Optimiser([student], cfg.optim, cfg.optim.lr),
        Optimiser([critic, head], cfg.optim, cfg.optim.lr * cfg.critic.lr_multiplier, clips=cfg.optim.clip_critic),
        null=null(kind) if cfg.guided else None,
        distance=distance or torch.nn.functional.mse_loss,
    )  # fmt: skip


def batches(kind: str, cfg: RunConfig, micro_batch: int = 1 << 30, seed: int = 0) -> Batches:
    """The run's batches over a small random real set, which serves as pair set too."""
    real = TensorSet(tensors(kind, 32, seed=9))
    return Batches(cfg, seed, torch.device("cpu"), micro_batch, real, real)


def one_batch(kind: str, cfg: RunConfig, iteration: int = 0) -> Batch:
    """The whole global batch of an iteration."""
    (batch,) = batches(kind, cfg).at(iteration)
    return batch


def weights(module: torch.nn.Module | None) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {} if module is None else deepcopy(module.state_dict())


def same(before: dict[str, Tensor], module: torch.nn.Module) -> bool:
    """Whether a module still has exactly that state."""
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def gradients(*modules: torch.nn.Module | None) -> Iterator[Tensor]:
    """Gradients stored on the modules' parameters."""
    for module in modules:
        yield from (p.grad for p in (module.parameters() if module else ()) if p.grad is not None)


GIVEN = torch.zeros(4, 1, SIZE, SIZE), torch.full((4,), 80.0)  # of a student's pass, where nothing depends on it
