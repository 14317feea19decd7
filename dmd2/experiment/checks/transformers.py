"""Whether the flow-matching transformer that a teacher section describes serves its data; imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dmd2.experiment.data_config import Data

NETWORK = "teacher.network"
Problem = tuple[str, ...]  # dotted keys of a run, the first of which names it in the sentence, and the sentence


class Shape(NamedTuple):
    """A class of transformers: its family, and where its config says what it takes.

    family: module and class in `dmd2.networks.transformers`. source: module in diffusers' ``models.transformers``.
    text: width of text states. classes: width of the vector that a class becomes, of SD3 and FLUX the pooled one.
    tokens: of a caption by the family's pipeline, after `clip` ones. packed: latents in one channel of the network.
    sized: positions are for one size. patch: key of the patch's side. blocks: of the numbers of its blocks.
    """

    family: str
    source: str
    text: str
    classes: str
    tokens: int
    clip: int = 0
    packed: int = 1
    sized: bool = False
    patch: str | None = "patch_size"
    blocks: tuple[str, ...] = ("num_layers",)


SHAPES = {
    "SD3Transformer2DModel": Shape(
        "sd3:SD3", "transformer_sd3", "joint_attention_dim", "pooled_projection_dim", 256, clip=77, sized=True),
    "FluxTransformer2DModel": Shape(
        "flux:Flux", "transformer_flux", "joint_attention_dim", "pooled_projection_dim", 512, packed=4, patch=None,
        blocks=("num_layers", "num_single_layers")),
    "SanaTransformer2DModel": Shape(
        "sana:Sana", "sana_transformer", "caption_channels", "caption_channels", 300, sized=True),
    "Lumina2Transformer2DModel": Shape(
        "lumina2:Lumina2", "transformer_lumina2", "cap_feat_dim", "cap_feat_dim", 256),
    "ZImageTransformer2DModel": Shape(
        "z_image:ZImage", "transformer_z_image", "cap_feat_dim", "cap_feat_dim", 512, patch="all_patch_size",
        blocks=("n_layers",)),
}  # fmt: skip


def side_of(kind: str, values: Mapping[str, Any], resolution: int) -> int:
    """Tokens along a side of the image."""
    return resolution // _patch(kind, values)


def blocks_of(kind: str, values: Mapping[str, Any]) -> int:
    """Blocks that the GAN's head can be put on."""
    return sum(values[key] for key in SHAPES[kind].blocks)


def _patch(kind: str, values: Mapping[str, Any]) -> int:
    key = SHAPES[kind].patch
    if key is None:
        return 2
    return values[key][0] if isinstance(values[key], list | tuple) else values[key]


def transformer_problems(kind: str, values: Mapping[str, Any], data: Data, states: int | None) -> Iterator[Problem]:
    """What is wrong with a transformer's config for a data section.

    Args:
        values: the config with the defaults of its class. states: width of the text states, where it is known.
    """
    shape, patch = SHAPES[kind], _patch(kind, values)
    for key in ("in_channels", "out_channels"):
        wanted = data.channels * shape.packed
        if values.get(key) not in (wanted, None):
            told = f"{key} is {values[key]}, but data.channels is {data.channels}"
            told += f", packed {shape.packed} to a token" if shape.packed > 1 else ""
            yield f"{NETWORK}.{key}", "data.channels", told
    if shape.sized and values["sample_size"] != data.resolution:
        told = f"sample_size is {values['sample_size']}, but data.resolution is {data.resolution}"
        yield f"{NETWORK}.sample_size", "data.resolution", told
    if data.resolution % patch:
        key = f"{NETWORK}.{shape.patch}" if shape.patch else f"{NETWORK}._class_name"
        yield key, "data.resolution", f"a token is {patch}x{patch}, but data.resolution is {data.resolution}"
    if "pos_embed_max_size" in values and values["pos_embed_max_size"] < data.resolution // patch:
        told = f"pos_embed_max_size is {values['pos_embed_max_size']}, but there are {data.resolution // patch} tokens"
        yield f"{NETWORK}.pos_embed_max_size", "data.resolution", f"{told} along a side"
    if data.text is None and values[shape.classes] < data.classes + 1:
        told = f"{shape.classes} is {values[shape.classes]}, but {data.classes} classes and no class are a vector of"
        yield f"{NETWORK}.{shape.classes}", "data.classes", f"{told} {data.classes + 1}"
    if data.text is not None and states is not None:
        # An encoder of one's own makes no pooled vector: the mean of its states stands for it.
        for key in dict.fromkeys((shape.text, shape.classes)):
            if values[key] != states:
                told = f"{key} is {values[key]}, but {data.text.pipeline.encoder} gives text states of {states}"
                yield f"{NETWORK}.{key}", "data.text.pipeline.encoder", told
