"""Whether the sections of a run fit one another: data, teacher and training; imports no torch.

A pydantic model checks its own fields and what one sentence says of the whole section, wherever it is read. This
package checks once, when the tables are read, what needs two sections or keys, other runs, or files.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from math import log2
from operator import attrgetter
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.checks.measurement import evaluation_problems
from dmd2.experiment.checks.network import defaults, network_problems
from dmd2.experiment.checks.transformers import NETWORK, SHAPES, Problem, blocks_of, side_of
from dmd2.experiment.config import RunConfig
from dmd2.experiment.data_config import CAPTIONED, Data
from dmd2.experiment.dotted_keys import LocatedConfig
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.teacher_config import GUIDANCE_EMBED, Teacher

# What is known of sources without reading them: channels, resolution, classes (None: as the config says).
KNOWN_SETS = {"sklearn-digits": (1, 8, 10), "cifar10": (3, 32, 10), "idx": (1, None, None)}
SOLVERS = {"edm": ("heun",), "eps": ("ddim", "ddpm", "pndm", "euler"), "flow": ("euler", "heun")}
# Weights of the terms that train a student (`dmd2.method.objectives.terms`, which imports torch), off at 0.
TRAIN_STUDENT = ("dm.weight", "gan.lambda_g", "regression.weight", "generator.isg", "dm.moments_kl")
LEVELS, SIGMA_MIN, SIGMA_MAX, RHO = 1000, 0.002, 80.0, 7.0  # as dmd2.networks.schedules, which imports torch


def check_all(located: Iterable[LocatedConfig], sets: Mapping[str, Data]) -> None:
    """Check configs of bases and rows, together with the other sets that they name, of all `sets` by name.

    Raises:
        UserError: one sentence with file, line and key for the first problem.
    """
    for one in located:
        for *keys, told in problems(one.cfg, sets):
            named = told if told.startswith(keys[0]) else f"{keys[0]}: {told}"
            raise UserError(f"{one.where(*keys)}: {one.row}{named}")


def problems(cfg: RunConfig, sets: Mapping[str, Data]) -> Iterator[Problem]:
    """All that does not fit in a config, given every data section by name."""
    yield from _data(cfg.data)
    yield from _teacher(cfg)
    yield from _embedder(cfg.teacher)
    yield from _losses(cfg)
    yield from _student_input(cfg)
    yield from _head(cfg)
    yield from evaluation_problems(cfg, sets)


def _data(data: Data) -> Iterator[Problem]:
    kind, text = data.source.kind, data.text
    if text is not None and kind in KNOWN_SETS:
        yield "data.source.kind", "data.text", f"{kind} has no captions: leave out data.text and give data.classes"
        return
    known = KNOWN_SETS.get(kind, (None, None, None))
    for key, value in zip(("channels", "resolution", "classes"), known, strict=True):
        unread = key == "classes" and not data.classes
        if value is not None and getattr(data, key) != value and not unread:
            yield f"data.{key}", "data.source.kind", f"{getattr(data, key)}, but the images of {kind} have {value}"
    if text is not None and not data.latents and data.channels != 3 and kind != "latents":
        yield "data.channels", "data.text", f"{data.channels}, but images with captions are read as RGB: 3"
    if text is not None and data.latents and text.pipeline.autoencoder is not None:
        yield from _autoencoder(text.pipeline.autoencoder.network, data)


def _autoencoder(network: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    key, kind = "data.text.pipeline.autoencoder", data.source.kind
    if kind not in (*CAPTIONED, "image-folder", "hub"):
        yield key, "data.source.kind", f"an autoencoder is trained here on images, which {kind} has none of"
    key = f"{key}.network"
    for name in ("in_channels", "out_channels"):
        if network.get(name, 3) != 3:
            yield f"{key}.{name}", f"{network[name]}, but images with captions are read as RGB: 3"
    levels = len(network.get("block_out_channels", [64]))
    for name in ("down_block_types", "up_block_types"):
        if (count := len(network.get(name, ["one"]))) != levels:
            yield f"{key}.{name}", f"{key}.block_out_channels", f"{count} blocks, but {levels} block_out_channels"
    side, pixels, size = data.resolution, data.resolution * 2 ** (levels - 1), network.get("sample_size")
    if size not in (None, pixels):
        told = f"{size}, but {levels} levels make latents of {side} pixels from {pixels} pixels"
        yield f"{key}.sample_size", "data.resolution", told
    if (width := network.get("latent_channels", 4)) != data.channels:
        told = f"{data.channels}, but the autoencoder's latent_channels is {width}"
        yield "data.channels", f"{key}.latent_channels", told


def _samplers(cfg: RunConfig) -> dict[str, Sampler]:
    """Every sampler of a teacher, by its key."""
    of_rows = {f"eval.teacher_samplers.{name}": sampler for name, sampler in cfg.eval.teacher_samplers.items()}
    pairs = cfg.regression.pairs
    return of_rows if pairs is None else {"regression.pairs.sampler": pairs.sampler, **of_rows}


def _teacher(cfg: RunConfig) -> Iterator[Problem]:
    teacher, samplers, classes = cfg.teacher, _samplers(cfg), cfg.data.classes
    yield from _solvers(samplers, teacher.parameterisation)
    guidance = {**cfg.guidance, **{f"{key}.guidance": s.guidance for key, s in samplers.items()}}
    if not cfg.needs_pairs:
        guidance.pop("regression.pairs.sampler.guidance", None)
    guided = next((key for key, strength in guidance.items() if strength > 1), None)
    dropout = 0.0 if teacher.train is None else teacher.train.label_dropout
    if (guided or dropout) and not cfg.data.labelled and cfg.data.text is None:
        key = guided or "teacher.train.label_dropout"
        yield key, "data.classes", f"data {cfg.data.name} has no condition to be guided by or to drop: leave it out"
        return
    kind = (teacher.network or {}).get("_class_name", "UNet2DModel")
    if teacher.network is not None:
        if (kind in SHAPES) != (teacher.parameterisation == "flow"):
            told = f"a {kind} is {'a' if kind in SHAPES else 'no'} flow network, and teacher.parameterisation is"
            yield "teacher.parameterisation", f"{NETWORK}._class_name", f"{told} {teacher.parameterisation}"
        yield from network_problems(teacher.network, cfg.data, guided)
    if guided is not None and teacher.train is not None and dropout == 0:
        told = "guidance leads away from no condition, which the teacher must see in training"
        yield "teacher.train.label_dropout", guided, f"0, but {guided} is above 1: {told}"
    embeds, key = (teacher.network or {}).get("num_class_embeds"), "teacher.train.label_dropout"
    if dropout > 0 and cfg.data.text is None and kind not in SHAPES and embeds != classes + 1:
        yield f"{NETWORK}.num_class_embeds", key, f"{embeds}, but {key} needs {classes + 1}: data.classes and no class"
    if cfg.released_whole and teacher.network is None:
        told = "train.released needs teacher.network: the architecture of the weights in the file"
        yield "train.released", NETWORK, told


def _embedder(teacher: Teacher) -> Iterator[Problem]:
    network = teacher.network or {}
    if teacher.guidance_embed == GUIDANCE_EMBED or "_class_name" not in network:
        return
    if not {**defaults(network["_class_name"]), **network}.get("guidance_embeds"):
        told = f"{teacher.guidance_embed:g}, but the network has no guidance embedder to tell it: leave it out"
        yield "teacher.guidance_embed", f"{NETWORK}.guidance_embeds", told


def _solvers(samplers: Mapping[str, Sampler], form: str) -> Iterator[Problem]:
    for key, sampler in samplers.items():
        if sampler.solver not in SOLVERS[form]:
            yield key, f"{sampler.solver} cannot sample {'a' if form == 'flow' else 'an'} {form} teacher"
        if sampler.churn > 0 and form != "edm":
            yield f"{key}.churn", f"{sampler.churn:g}, but churn is for edm teachers"
        if sampler.s_min > sampler.s_max:
            yield f"{key}.s_min", f"{key}.s_max", f"{sampler.s_min} is above s_max {sampler.s_max}"


def _losses(cfg: RunConfig) -> Iterator[Problem]:
    gan, dm, critic, regression, data = cfg.gan, cfg.dm, cfg.critic, cfg.regression, cfg.data
    form = cfg.teacher.parameterisation
    if (critic.weighting == "v" and form != "flow") or (critic.weighting == "edm" and form == "flow"):
        yield "critic.weighting", "teacher.parameterisation", f"{critic.weighting} is no weighting of {form} teachers"
    if not any(attrgetter(key)(cfg) for key in TRAIN_STUDENT):
        told = f"{', '.join(TRAIN_STUDENT[:-1])} and {TRAIN_STUDENT[-1]} are all 0: nothing would train the student"
        yield *TRAIN_STUDENT, told
    if cfg.needs_pairs and regression.pairs is None:
        told = f"{regression.weight}, but there are no regression.pairs: give count, sampler and shards in the base"
        yield "regression.weight", "regression.pairs", told
    if gan.lambda_g > 0 and gan.lambda_d == 0:
        yield (
            "gan.lambda_d",
            "gan.lambda_g",
            "gan.lambda_d is 0 but gan.lambda_g is not: the head would never be trained",
        )
    if dm.weight > 0 and not cfg.trains_critic:
        told = "critic.denoise_weight and gan.lambda_d are both 0: nothing would train the critic"
        yield "critic.denoise_weight", "gan.lambda_d", told
    ranges = (gan.noise_range, dm.index_range, critic.index_range)
    if gan.on and gan.shares_noise and len(set(ranges)) > 1:
        told = "gan.noise_range {}, dm.index_range {}, critic.index_range {}".format(*map(json.dumps, ranges))
        yield "gan.shares_noise", f"gan.shares_noise needs one range of noise levels, not {told}"
    if gan.on and gan.shares_noise and dm.renoise == "constrained":
        told = "constrained, but the GAN, which shares the sample (gan.shares_noise), judges all levels: leave out one"
        yield "dm.renoise", "gan.shares_noise", told
    yield from _successors(cfg)
    if cfg.needs_pairs and regression.distance == "lpips" and not data.latents and data.channels not in (1, 3):
        told = f"lpips compares images of 1 or 3 channels, data.channels is {data.channels}"
        yield "regression.distance", "data.channels", told
    if regression.decoder == "vae_tiny" and not data.latents:
        yield "regression.decoder", "vae_tiny decodes latents (data.text.latents), and this run diffuses images"


def _successors(cfg: RunConfig) -> Iterator[Problem]:
    """What the methods after DMD2 need."""
    gan, dm, teacher = cfg.gan, cfg.dm, cfg.teacher
    if dm.divergence != "rkl" and gan.lambda_g == 0:
        told = f"{dm.divergence} weights images by the GAN's head, and gan.lambda_g is 0: write rkl, or turn the GAN on"
        yield "dm.divergence", "gan.lambda_g", told
    if dm.divergence != "rkl" and gan.noise_range is None:
        told = f"{dm.divergence} asks the head about noised images, and with gan.noise_range null it learns clean ones"
        yield "dm.divergence", "gan.noise_range", told
    if dm.divergence != "rkl" and gan.loss == "hinge":
        told = f"{dm.divergence} takes the head's logit for that of a probability, which of a hinge loss it is not"
        yield "dm.divergence", "gan.loss", f"{told}: write logistic"
    key, scale = ("teacher.guidance", teacher.guidance) if dm.guidance is None else ("dm.guidance", dm.guidance[1])
    if dm.objective == "decoupled" and scale == 1:
        yield "dm.objective", key, f"decoupled parts guidance from the rest, and {key} is 1, none"
    if dm.objective == "decoupled" and teacher.rescale is not None:
        yield "dm.objective", "teacher.rescale", "decoupled has no norm of the whole to rescale: leave out one"
    if gan.on and gan.level_weight and teacher.parameterisation != "edm" and cfg.generator.steps == 1:
        told = "a student of one step makes all images at one level: leave it out, and lower gan.lambda_g instead"
        yield "gan.level_weight", "generator.steps", told
    if gan.level_weight and teacher.parameterisation == "edm":
        told = "alpha is 1 at all levels of an edm teacher: leave it out"
        yield "gan.level_weight", "teacher.parameterisation", told


def _student_input(cfg: RunConfig) -> Iterator[Problem]:
    steps, first, form = cfg.generator.steps, cfg.generator.time, cfg.teacher.parameterisation
    if form == "edm" and first > SIGMA_MAX:
        yield "generator.time", f"{first} is above {SIGMA_MAX}, the largest sigma of an edm teacher"
    if form == "eps" and (first > LEVELS - 1 or first % 1):
        yield "generator.time", f"{first} is no step of an eps teacher: 0 to 999, whole"
    if form != "flow" and cfg.generator.sampler == "euler":
        told = f"euler, but such steps between the student's levels are of flow teachers, and this one is {form}"
        yield "generator.sampler", "teacher.parameterisation", told
    if form == "flow" and first != 1:
        yield "generator.time", f"{first}, but a student of a flow teacher begins at sigma 1, pure noise: write 1.0"
    if steps > 1 and first <= (second := second_time(steps, form, cfg.teacher.shift)):
        told = f"{first} is not above {second:.4g}, the second of the {steps} times of generator.steps"
        yield "generator.time", "generator.steps", told
    if cfg.generator.lora is not None and cfg.data.text is None:
        yield "generator.lora", "generator.lora is for text runs (data.text): other runs train all weights"


def second_time(steps: int, parameterisation: str, shift: float = 1.0) -> float:
    """The second time of a student of several steps (`Schedule.step_times`)."""
    index = LEVELS - 1 - LEVELS // steps
    if parameterisation == "eps":
        return index
    if parameterisation == "flow":
        u = (index + 1) / LEVELS
        return shift * u / (1 + (shift - 1) * u)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (low + index / (LEVELS - 1) * (high - low)) ** RHO


def _head(cfg: RunConfig) -> Iterator[Problem]:
    """The GAN's head halves the bottleneck to 4x4 (`dmd2.networks.head`); other sizes do not end in one logit."""
    network, side = cfg.teacher.network or {}, cfg.data.resolution
    kind, levels = network.get("_class_name", "UNet2DModel"), network.get("block_out_channels")
    if cfg.gan.tap is not None and kind not in SHAPES:
        yield "gan.tap", f"{NETWORK}._class_name", f"{cfg.gan.tap}, but the teacher is no transformer: leave it out"
    if kind in SHAPES:
        values = {**defaults(kind), **network}
        count = blocks_of(kind, values)
        if cfg.gan.taps[-1:] >= [count]:
            yield (
                "gan.tap",
                f"{NETWORK}.{SHAPES[kind].blocks[-1]}",
                f"{cfg.gan.taps[-1]}, but blocks are 0 to {count - 1}",
            )
        bottleneck, key, what = side_of(kind, values, side), "patch_size", "patches"
    elif levels is not None:
        bottleneck, key, what = side // 2 ** (len(levels) - 1), "block_out_channels", f"{len(levels)} levels"
    else:
        return
    if cfg.gan.head == "patches":
        if cfg.gan.on and bottleneck < 2:
            told = f"patches need features of 2 pixels or more, and {what} leave {bottleneck}: use single"
            yield "gan.head", f"{NETWORK}.{key}", told
        return
    last = bottleneck
    for _ in range(max(0, round(log2(bottleneck / 4))) if bottleneck else 0):
        last //= 2
    if cfg.gan.on and (last != min(4, bottleneck) or not bottleneck):
        told = f"data.resolution {side} and {what} leave {bottleneck}"
        told = f"the GAN's head needs a bottleneck of 1 to 4 pixels or 4 times a power of two, but {told}"
        yield "gan.lambda_g", f"{NETWORK}.{key}", "data.resolution", told
