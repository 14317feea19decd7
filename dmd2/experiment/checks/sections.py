"""Whether the sections of a run fit one another: data, teacher, training and evaluation; imports no torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import log2
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.checks.measurement import evaluation_problems
from dmd2.experiment.checks.network import Problem, network_problems
from dmd2.experiment.config import RunConfig
from dmd2.experiment.data_config import CAPTIONED, Data
from dmd2.experiment.dotted_keys import Written

# What is known of sources without reading them: channels, resolution, classes (None: as the config says).
KNOWN_SETS = {"sklearn-digits": (1, 8, 10), "cifar10": (3, 32, 10), "idx": (1, None, None)}
LABELLED_ONLY = tuple(KNOWN_SETS)
NAMES = r"\w[\w.-]*"  # of what becomes a folder and part of Snakemake's patterns
LEVELS, SIGMA_MIN, SIGMA_MAX, RHO = 1000, 0.002, 80.0, 7.0  # as dmd2.networks.schedules, which imports torch


def check_all(written: Sequence[Written]) -> None:
    """Check the config of every base and row that a table uses.

    Raises:
        UserError: one sentence with file, line and key for the first problem.
    """
    sets = {one.cfg.data.name: one.cfg.data for one in written}
    for one in written:
        for keys, told in problems(one.cfg, sets):
            raise UserError(f"{one.where(*keys)}: {one.row}{keys[0]}: {told}")


def problems(cfg: RunConfig, sets: Mapping[str, Data]) -> Iterator[Problem]:
    """All that does not fit, given every data section by name: keys (the first names it), and a sentence."""
    yield from _names(cfg)
    yield from _data(cfg.data)
    yield from _teacher(cfg)
    yield from _training(cfg)
    yield from evaluation_problems(cfg, sets)


def _names(cfg: RunConfig) -> Iterator[Problem]:
    names = {"data.name": cfg.data.name, "teacher.name": cfg.teacher.name}
    for key, name in names.items():
        if not re.fullmatch(NAMES, name):
            yield (key,), f"{name!r} is no name of a folder: use letters, digits, _, - and ."
    for name in cfg.eval.teacher_samplers:
        if not re.fullmatch(r"\w+", name):
            yield (f"eval.teacher_samplers.{name}",), "the name of a sampler has letters, digits and _ only"


def _data(data: Data) -> Iterator[Problem]:
    kind = data.source.kind
    if data.text is not None and kind in LABELLED_ONLY:
        yield ("data.source.kind", "data.text"), f"{kind} has no captions: leave out data.text and give data.classes"
        return
    known = KNOWN_SETS.get(kind, (None, None, None))
    for key, value in zip(("channels", "resolution", "classes"), known, strict=True):
        if value is not None and getattr(data, key) != value:
            yield (f"data.{key}", "data.source.kind"), f"{getattr(data, key)}, but the images of {kind} have {value}"
    if data.text is None:
        return
    made = data.text.pipeline.autoencoder
    if not data.latents:
        if data.channels != 3 and kind != "latents":
            yield (
                ("data.channels", "data.text"),
                f"{data.channels}, but images with captions are read as RGB: 3",
            )
        return
    if made is not None and kind not in (*CAPTIONED, "image-folder", "hub"):
        told = f"an autoencoder is trained here on images, which {kind} has none of"
        yield ("data.text.pipeline.autoencoder", "data.source.kind"), told
    if made is not None:
        yield from _autoencoder(made.network, data)
    if made is not None and (width := made.network.get("latent_channels", 4)) != data.channels:
        keys = ("data.channels", "data.text.pipeline.autoencoder.network.latent_channels")
        yield keys, f"{data.channels}, but the autoencoder's latent_channels is {width}"


def _autoencoder(network: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    where = "data.text.pipeline.autoencoder.network"
    for key in ("in_channels", "out_channels"):
        if network.get(key, 3) != 3:
            yield (f"{where}.{key}",), f"{network[key]}, but images with captions are read as RGB: 3"
    levels = len(network.get("block_out_channels", [64]))
    for key in ("down_block_types", "up_block_types"):
        if (count := len(network.get(key, ["one"]))) != levels:
            yield (f"{where}.{key}", f"{where}.block_out_channels"), f"{count} blocks, but {levels} block_out_channels"
    if (size := network.get("sample_size")) not in (None, pixels := data.resolution * 2 ** (levels - 1)):
        keys = (f"{where}.sample_size", "data.resolution")
        yield (
            keys,
            f"{size}, but {levels} levels make latents of {data.resolution} pixels from {pixels} pixels",
        )


def _teacher(cfg: RunConfig) -> Iterator[Problem]:
    teacher, guided = cfg.teacher, next(_guided(cfg), None)
    if teacher.network is not None:
        yield from network_problems(teacher.network, cfg.data, guided)
    if teacher.train is None:
        return
    dropout = teacher.train.label_dropout
    if guided is not None and dropout == 0:
        told = (
            f"0, but {guided} is above 1: guidance leads away from no condition, which the teacher must see in training"
        )
        yield ("teacher.train.label_dropout", guided), told
    embeds = (teacher.network or {}).get("num_class_embeds")
    if dropout > 0 and cfg.data.text is None and embeds != cfg.data.classes + 1:
        keys = ("teacher.network.num_class_embeds", "teacher.train.label_dropout")
        yield keys, f"{embeds}, but teacher.train.label_dropout needs {cfg.data.classes + 1}: data.classes and no class"


def _guided(cfg: RunConfig) -> Iterator[str]:
    """Keys that ask for classifier-free guidance."""
    if cfg.teacher.guidance > 1:
        yield "teacher.guidance"
    if cfg.needs_pairs and cfg.regression.pairs.sampler.guidance > 1:
        yield "regression.pairs.sampler.guidance"
    for name, sampler in cfg.eval.teacher_samplers.items():
        if sampler.guidance > 1:
            yield f"eval.teacher_samplers.{name}.guidance"


def _training(cfg: RunConfig) -> Iterator[Problem]:
    generator, first = cfg.generator, cfg.generator.time
    edm = cfg.teacher.parameterisation == "edm"
    if edm and first > SIGMA_MAX:
        yield ("generator.time",), f"{first} is above {SIGMA_MAX}, the largest sigma of an edm teacher"
    if generator.steps > 1 and first <= (second := second_time(generator.steps, edm)):
        keys = ("generator.time", "generator.steps")
        yield keys, f"{first} is not above {second:.4g}, the second of the {generator.steps} times of generator.steps"
    regression = cfg.regression
    if cfg.needs_pairs and regression.distance == "lpips" and not cfg.data.latents and cfg.data.channels not in (1, 3):
        keys = ("regression.distance", "data.channels")
        yield keys, f"lpips compares images of 1 or 3 channels, data.channels is {cfg.data.channels}"
    if regression.decoder == "vae_tiny" and not cfg.data.latents:
        yield ("regression.decoder",), "vae_tiny decodes latents (data.text.latents), and this run diffuses images"
    yield from _head(cfg)
    samplers = {f"eval.teacher_samplers.{name}": sampler for name, sampler in cfg.eval.teacher_samplers.items()}
    for key, sampler in {**samplers, "regression.pairs.sampler": regression.pairs.sampler}.items():
        if sampler.s_min > sampler.s_max:
            yield (
                (f"{key}.s_min", f"{key}.s_max"),
                f"{sampler.s_min} is above s_max {sampler.s_max}",
            )


def second_time(steps: int, edm: bool) -> float:
    """The second time of a student of several steps (`Schedule.step_times`)."""
    index = LEVELS - 1 - LEVELS // steps
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (low + index / (LEVELS - 1) * (high - low)) ** RHO if edm else index


def _head(cfg: RunConfig) -> Iterator[Problem]:
    """The GAN's head halves the bottleneck to 4x4 (`dmd2.networks.head`); other sizes do not end in one logit."""
    levels = (cfg.teacher.network or {}).get("block_out_channels")
    if not cfg.gan.on or levels is None:
        return
    side = bottleneck = cfg.data.resolution // 2 ** (len(levels) - 1)
    for _ in range(max(0, round(log2(side / 4))) if side else 0):
        side //= 2
    if side != min(4, bottleneck) or not bottleneck:
        yield (
            ("gan.lambda_g", "teacher.network.block_out_channels", "data.resolution"),
            (
                f"the GAN's head needs a bottleneck of 1 to 4 pixels or 4 times a power of two, but data.resolution "
                f"{cfg.data.resolution} and {len(levels)} levels leave {bottleneck}"
            ),
        )
