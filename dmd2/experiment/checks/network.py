"""Whether the network that a teacher section or a diffusers folder describes can be built and serves its data.

Only the description is read, and torch is not imported: a wrong one is told before anything runs. What the installed
diffusers can build is read from its sources.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dmd2.core.errors import did_you_mean
from dmd2.experiment.data_config import Data

Problem = tuple[tuple[str, ...], str]  # dotted keys of a run, the first of which names it in the sentence
SOURCES = {  # classes of networks: package, path in it
    "UNet2DModel": ("diffusers", "models/unets/unet_2d.py"),
    "UNet2DConditionModel": ("diffusers", "models/unets/unet_2d_condition.py"),
    "SongUNet": ("dmd2", "networks", "song_unet.py"),
}
TEXT_WIDTHS = {"all-minilm-l6-v2": 384}  # of the encoders that packages ship


def _file(package: str, *path: str) -> str:
    found = importlib.util.find_spec(package)  # which does not import it
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]).joinpath(*path).read_text(encoding="utf-8")


@cache
def defaults(kind: str) -> Mapping[str, Any]:
    """Arguments of a class of networks with their defaults, as its source says."""
    functions = (
        node
        for body in ast.parse(_file(*SOURCES[kind])).body
        if isinstance(body, ast.ClassDef) and body.name == kind
        for node in body.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    arguments = next(functions).args
    names = [argument.arg for argument in arguments.args[1:]]
    values = [ast.literal_eval(value) for value in arguments.defaults]
    return dict(zip(names, values, strict=True))


@cache
def blocks(direction: str) -> list[str]:
    """Names of diffusers' ``down`` or ``up`` blocks."""
    return re.findall(rf'{direction}_block_type == "(\w+)"', _file("diffusers", "models/unets/unet_2d_blocks.py"))


def network_problems(network: Mapping[str, Any], data: Data, guided: str | None) -> Iterator[Problem]:
    """What is wrong with a network's config for a data section.

    Args:
        network: a diffusers config.
        data: what it denoises.
        guided: the key that asks for guidance, which needs the condition of no class, or None.
    """
    kind = network.get("_class_name", "UNet2DModel")
    if kind not in SOURCES:
        yield _key("_class_name"), f"there is no network {kind}, choose from {', '.join(SOURCES)}"
        return
    known = defaults(kind)
    values = {**known, **network}
    if data.text is not None or kind == "UNet2DConditionModel":
        yield from _text(kind, values, data)
    for key in network:
        if key not in known and not key.startswith("_"):
            yield _key(key), f"a {kind} has no {key}{did_you_mean(key, known)}"
    yield from _shape(values, data)
    yield from _levels(kind, values, data)
    yield from _classes(values, data, guided)


def _key(name: str) -> tuple[str, ...]:
    return (f"teacher.network.{name}",)


def _shape(values: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    for key in ("in_channels", "out_channels"):
        if values[key] != data.channels:
            yield (*_key(key), "data.channels"), f"{key} is {values[key]}, but data.channels is {data.channels}"
    size = values["sample_size"]
    if size is not None and size != data.resolution and list(_listed(size)) != [data.resolution] * 2:
        keys = (*_key("sample_size"), "data.resolution")
        yield keys, f"sample_size is {size}, but data.resolution is {data.resolution}"


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _levels(kind: str, values: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    widths = values["block_out_channels"]
    keys = _key("block_out_channels")
    if not (isinstance(widths, list | tuple) and widths and all(type(w) is int and w > 0 for w in widths)):
        yield keys, f"block_out_channels is {widths!r}, not a list of widths"
        return
    halvings = 2 ** (len(widths) - 1)
    # Only UNet2DConditionModel can enlarge to a size that is not twice the smaller one; the head cannot.
    if data.resolution % halvings and (kind != "UNet2DConditionModel" or data.resolution < halvings):
        yield (
            (*keys, "data.resolution"),
            (
                f"{len(widths)} levels halve the resolution {len(widths) - 1} times, but data.resolution "
                f"{data.resolution} is no multiple of {halvings}"
            ),
        )
    if kind == "SongUNet":
        groups = {width: min(32, width // 4) for width in (*widths, values["model_channels"])}
    else:
        groups = dict.fromkeys(widths, values["norm_num_groups"])
        for direction in ("down", "up"):
            yield from _blocks(direction, values)
        heads = _listed(values["attention_head_dim"])
        types = [*_listed(values["down_block_types"]), *_listed(values["up_block_types"])]
        attends = any("Attn" in str(name) for name in types) or values.get("add_attention", False)
        if attends and (wrong := [head for head in heads if head is not None and not _at_most(head, min(widths))]):
            yield _key("attention_head_dim"), f"attention_head_dim {wrong[0]} must be from 1 to the width of its level"
    for width, count in groups.items():
        if count is not None and (type(count) is not int or count < 1 or width % count):
            told = f"a level of width {width} cannot be normalised in {count} groups"
            yield (*(keys if kind == "SongUNet" else _key("norm_num_groups")), *keys), told


def _at_most(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _blocks(direction: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    key, known = f"{direction}_block_types", blocks(direction)
    names = _listed(values[key])
    if len(names) != len(values["block_out_channels"]):
        told = f"{key} has {len(names)} blocks, but block_out_channels {len(values['block_out_channels'])}"
        yield (*_key(key), *_key("block_out_channels")), told
    for name in names:
        if name not in known:
            yield _key(key), f"there is no block {name}{did_you_mean(name, known)}"


def _classes(values: Mapping[str, Any], data: Data, guided: str | None) -> Iterator[Problem]:
    """Labels are 0 to classes - 1, and that of no class is the next one (`dmd2.training.teachers.unconditional`)."""
    embeds, keys = values["num_class_embeds"], (*_key("num_class_embeds"), "data.classes")
    if data.text is not None:
        if embeds is not None:
            yield keys, f"num_class_embeds is {embeds}, but data.text conditions on captions"
    elif guided is not None and embeds != data.classes + 1:
        yield (
            (*keys, guided),
            (f"num_class_embeds is {embeds}, but {guided} needs {data.classes + 1}: data.classes and one for no class"),
        )
    elif embeds is not None and embeds not in (data.classes, data.classes + 1):
        yield (
            keys,
            (f"num_class_embeds is {embeds}, but data.classes is {data.classes}: give as many, or one more"),
        )


def _text(kind: str, values: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    if kind != "UNet2DConditionModel":
        yield (*_key("_class_name"), "data.text"), f"a {kind} reads no captions (data.text): use UNet2DConditionModel"
        return
    if data.text is None:
        types = [*_listed(values["down_block_types"]), values["mid_block_type"], *_listed(values["up_block_types"])]
        if crossing := [name for name in types if name and "CrossAttn" in name]:
            yield (*_key("down_block_types"), "data.text"), f"{crossing[0]} attends to captions, which need data.text"
        return
    width = TEXT_WIDTHS.get(data.text.pipeline.encoder or "")
    if width is not None and values["encoder_hid_dim"] is None and values["cross_attention_dim"] != width:
        keys = (*_key("cross_attention_dim"), "data.text.pipeline.encoder")
        told = f"{data.text.pipeline.encoder} gives text states of {width}"
        yield keys, f"cross_attention_dim is {values['cross_attention_dim']}, but {told}"
