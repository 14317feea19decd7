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
from dmd2.experiment.checks.transformers import NETWORK, SHAPES, Problem, transformer_problems
from dmd2.experiment.data_config import Data

SOURCES = {  # classes of UNets: package, path in it
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
    place = SOURCES.get(kind) or ("diffusers", "models", "transformers", f"{SHAPES[kind].source}.py")
    bodies = (node for node in ast.parse(_file(*place)).body if isinstance(node, ast.ClassDef))
    methods = [node for body in bodies if body.name == kind for node in body.body]
    arguments = next(m.args for m in methods if isinstance(m, ast.FunctionDef) and m.name == "__init__")
    values = map(ast.literal_eval, arguments.defaults)
    return dict(zip([argument.arg for argument in arguments.args[1:]], values, strict=True))


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
    if kind not in (kinds := [*SOURCES, *SHAPES]):
        yield f"{NETWORK}._class_name", f"there is no network {kind}, choose from {', '.join(kinds)}"
        return
    known = defaults(kind)
    values = {**known, **network}
    if kind not in SHAPES and (data.text is not None or kind == "UNet2DConditionModel"):
        yield from _text(kind, values, data)
    for key in network:
        if key not in known and not key.startswith("_"):
            yield f"{NETWORK}.{key}", f"a {kind} has no {key}{did_you_mean(key, known)}"
    if kind in SHAPES:
        encoder = None if data.text is None else data.text.pipeline.encoder
        yield from transformer_problems(kind, values, data, TEXT_WIDTHS.get(encoder or ""))
        return
    for key, field in (("in_channels", "channels"), ("out_channels", "channels"), ("sample_size", "resolution")):
        size = getattr(data, field)
        fits = values[key] in ((size, None, [size, size], (size, size)) if field == "resolution" else (size,))
        if not fits:
            yield f"{NETWORK}.{key}", f"data.{field}", f"{key} is {values[key]}, but data.{field} is {size}"
    yield from _levels(kind, values, data)
    yield from _classes(values, data, guided)


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _levels(kind: str, values: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    widths, key, song = values["block_out_channels"], f"{NETWORK}.block_out_channels", kind == "SongUNet"
    if not (isinstance(widths, list | tuple) and widths and all(map(_is_count, widths))):
        yield key, f"block_out_channels is {widths!r}, not a list of widths"
        return
    halvings, side = len(widths) - 1, data.resolution
    # Only UNet2DConditionModel can enlarge to a size that is not twice the smaller one; the head cannot.
    if side % 2**halvings and (kind != "UNet2DConditionModel" or side < 2**halvings):
        told = f"{len(widths)} levels halve the resolution {halvings} times"
        yield key, "data.resolution", f"{told}, but data.resolution {side} is no multiple of {2**halvings}"
    if song:
        groups = {width: min(32, width // 4) for width in (*widths, values["model_channels"])}
    else:
        groups = dict.fromkeys(widths, values["norm_num_groups"])
        yield from _blocks(values, min(widths))
    for width, count in groups.items():
        if count is not None and not (_is_count(count) and width % count == 0):
            told = f"a level of width {width} cannot be normalised in {count} groups"
            yield key if song else f"{NETWORK}.norm_num_groups", key, told


def _blocks(values: Mapping[str, Any], narrowest: int) -> Iterator[Problem]:
    levels, attends = len(values["block_out_channels"]), values.get("add_attention", False)
    for direction in ("down", "up"):
        key, known = f"{direction}_block_types", blocks(direction)
        names = _listed(values[key])
        attends = attends or any("Attn" in str(name) for name in names)
        if len(names) != levels:
            told = f"{key} has {len(names)} blocks, but block_out_channels {levels}"
            yield f"{NETWORK}.{key}", f"{NETWORK}.block_out_channels", told
        for name in names:
            if name not in known:
                yield f"{NETWORK}.{key}", f"there is no block {name}{did_you_mean(name, known)}"
    for head in _listed(values["attention_head_dim"]) if attends else ():
        if head is not None and not (_is_count(head) and head <= narrowest):
            told = f"attention_head_dim {head} must be from 1 to the width of its level"
            yield f"{NETWORK}.attention_head_dim", told


def _classes(values: Mapping[str, Any], data: Data, guided: str | None) -> Iterator[Problem]:
    """Labels are 0 to classes - 1, and that of no class is the next one (`dmd2.training.teachers.unconditional`)."""
    embeds, classes, key = values["num_class_embeds"], data.classes, f"{NETWORK}.num_class_embeds"
    told = f"num_class_embeds is {embeds}, but"
    if data.text is not None:
        if embeds is not None:
            yield key, "data.classes", f"{told} data.text conditions on captions"
    elif not data.labelled:
        if embeds is not None:
            yield key, "data.classes", f"{told} data.classes is 0: leave it out"
    elif guided is not None and embeds != classes + 1:
        yield key, "data.classes", guided, f"{told} {guided} needs {classes + 1}: data.classes and one for no class"
    elif embeds not in (None, classes, classes + 1):
        yield key, "data.classes", f"{told} data.classes is {classes}: give as many, or one more"


def _text(kind: str, values: Mapping[str, Any], data: Data) -> Iterator[Problem]:
    if kind != "UNet2DConditionModel":
        yield f"{NETWORK}._class_name", "data.text", f"a {kind} reads no captions (data.text): use UNet2DConditionModel"
        return
    if data.text is None:
        types = [*_listed(values["down_block_types"]), values["mid_block_type"], *_listed(values["up_block_types"])]
        if crossing := [name for name in types if name and "CrossAttn" in name]:
            told = f"{crossing[0]} attends to captions, which need data.text"
            yield f"{NETWORK}.down_block_types", "data.text", told
        return
    encoder, width = data.text.pipeline.encoder, values["cross_attention_dim"]
    states = TEXT_WIDTHS.get(encoder or "")
    if states not in (None, width) and values["encoder_hid_dim"] is None:
        told = f"cross_attention_dim is {width}, but {encoder} gives text states of {states}"
        yield f"{NETWORK}.cross_attention_dim", "data.text.pipeline.encoder", told
