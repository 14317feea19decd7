"""EDM's names of tensors and ours, both ways: ADM as diffusers' `UNet2DModel`, DDPM++ and NCSN++ as our `SongUNet`.

EDM's names are those of a file without the leading ``model.``. The tensors are the same up to the layout that
diffusers wants, so both ways are exact. EDM's files also hold the resampling filters, which are constants here.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DModel
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.networks.song_unet import SongUNet

State: TypeAlias = dict[str, Tensor]
EdmAble: TypeAlias = "UNet2DModel | SongUNet"

ADM_RESNET = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
              "skip": "conv_shortcut"}  # fmt: skip
ADM_TOP = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2",
           "out_norm": "conv_norm_out", "out_conv": "conv_out"}  # fmt: skip
SONG_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "projection", "norm1": "norm2", "conv1": "conv2",
              "skip": "shortcut", "norm2": "attention.norm", "qkv": "attention.qkv",
              "proj": "attention.out"}  # fmt: skip
SONG_TOP = {"map_layer0": "embedding.0", "map_layer1": "embedding.2", "map_label": "class_embedding"}
AUGMENTATION = "map_augment.weight"  # of no effect without augmentation labels, and not converted


@dataclass(frozen=True)
class Pair:
    """One tensor of EDM and what it is here; `there` and `back` convert between them."""

    edm: str
    ours: tuple[str, ...]
    there: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)
    back: Callable[..., Tensor] = lambda tensor: tensor


def infer(state: State, where: Path) -> dict[str, Any]:
    """The config of our network, with its ``_class_name``, read off names and shapes of EDM's.

    Raises:
        UserError: these are not the tensors of such a network, or `UNet2DModel` cannot express it.
    """
    found = [re.match(r"enc\.(\d{1,5})x\1_(?:block(\d{1,4})\.)?", name) for name in state]
    sizes = sorted({int(match[1]) for match in found if match}, reverse=True)
    blocks = [int(match[2]) for match in found if match and match[2]]
    song = any(name.startswith(f"dec.{sizes[0]}x{sizes[0]}_aux_conv.") for name in state) if sizes else False
    if not blocks or not (song or "out_conv.weight" in state):
        raise UserError(
            f"{where} does not hold a network of EDM: there is no enc.64x64_block0.conv0.weight and the like"
        )

    def shape(name: str, axes: int = 4) -> torch.Size:
        if name not in state:
            raise UserError(f"{where}: {name} is missing: the file is not whole, or of another kind of network")
        if state[name].ndim != axes:
            raise UserError(f"{where}: {name} has {state[name].ndim} axes instead of {axes}")
        return state[name].shape

    first, last = (f"dec.{sizes[0]}x{sizes[0]}_aux_conv.weight" if song else "out_conv.weight"), sizes[0]
    config = {
        "sample_size": sizes[0], "in_channels": shape(f"enc.{last}x{last}_conv.weight")[1],
        "out_channels": shape(first)[0], "layers_per_block": max(blocks) + 1,
        "block_out_channels": [shape(f"enc.{r}x{r}_block0.conv0.weight")[0] for r in sizes],
        "num_class_embeds": shape("map_label.weight", 2)[1] if any("map_label." in name for name in state) else None,
    }  # fmt: skip
    attention = [r for r in sizes if any(re.match(rf"enc\.{r}x{r}_block\d+\.(norm2|qkv|proj)\.", n) for n in state)]
    noise, embedding = shape("map_layer0.weight", 2)[1], shape("map_layer0.weight", 2)[0]
    if not song:
        return _adm(config, attention, noise, embedding, where)
    filters = [tensor for name, tensor in state.items() if name.endswith(".resample_filter")]
    wide = bool(filters) and filters[0].shape[-1] == 4
    return {
        "_class_name": "SongUNet", **config, "model_channels": shape(f"enc.{last}x{last}_conv.weight")[0],
        "attention_resolutions": attention, "noise_channels": noise, "embedding_channels": embedding,
        "embedding_type": "fourier" if "map_noise.freqs" in state else "positional",
        "encoder_type": "residual" if any("_aux_residual." in name for name in state) else "standard",
        "resample_filter": [1, 3, 3, 1] if wide else [1, 1],
    }  # fmt: skip


def _adm(config: dict[str, Any], attention: list[int], noise: int, embedding: int, where: Path) -> dict[str, Any]:
    """The config of a `UNet2DModel` that is this ADM, if there is one."""
    widths = config["block_out_channels"]
    sizes = [config["sample_size"] >> level for level in range(len(widths))]
    if bad := [width for width in widths if width < 128 or width % 32]:
        raise UserError(f"{where}: a level of {bad[0]} channels cannot be a UNet2DModel, whose norms have 32 groups "
                        "(EDM has fewer below 128 channels): only multiples of 32 from 128 on")  # fmt: skip
    attending = [width for width, r in zip(widths, sizes, strict=True) if r in attention or r == sizes[-1]]
    if bad := [width for width in attending if width % 64]:
        raise UserError(f"{where}: attention over {bad[0]} channels cannot be a UNet2DModel, whose heads have 64")
    if noise != widths[0] or embedding != 4 * widths[0]:
        raise UserError(f"{where}: a time embedding of {noise} and {embedding} channels cannot be a UNet2DModel, which "
                        f"has {widths[0]} and {4 * widths[0]} beside a first level of {widths[0]}")  # fmt: skip
    attend = [r in attention for r in sizes]
    return {
        "_class_name": "UNet2DModel", **config,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attend],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attend)],
        "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64, "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
    }  # fmt: skip


def empty(config: dict[str, Any]) -> EdmAble:
    """A network of that config without memory for its weights."""
    kind: type[EdmAble] = SongUNet if config["_class_name"] == "SongUNet" else UNet2DModel
    with torch.device("meta"):
        return kind(**{key: value for key, value in config.items() if not key.startswith("_")})


def from_edm(state: State, network: EdmAble, where: Path) -> State:
    """The tensors of EDM's names for `network`, in its own names; every one must be there and fit, and none more.

    Raises:
        UserError: one is missing, superfluous, of another shape, or a filter is not the network's.
    """
    pairs, filters = _pairs(network, where), _filters(network)
    own = network.state_dict()
    shapes = {pair.edm: pair.back(*(own[name].to("meta") for name in pair.ours)).shape for pair in pairs}
    shapes |= {name: tensor.shape for name, tensor in filters.items()}
    given = state.keys() - {AUGMENTATION}
    kind = f"a {type(network).__name__} of its settings"
    for names, text in ((shapes.keys() - given, "is missing"), (given - shapes.keys(), f"does not belong to {kind}")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where}: {min(names)} {text}{more}: the file is not whole, or of another network")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)} instead of {tuple(shape)}")
    for name, tensor in filters.items():
        if not torch.allclose(state[name].float(), tensor):
            raise UserError(f"{where}: {name} is not the filter {_taps(network)}, which the network has instead")
    return {
        ours: tensor.contiguous()
        for pair in pairs
        for ours, tensor in zip(pair.ours, pair.there(state[pair.edm]), strict=True)
    }


def to_edm(network: EdmAble, where: Path) -> State:
    """The network's tensors in EDM's names and layout, with the filters; an augmentation layer is gone for good.

    Raises:
        UserError: the network has tensors that EDM's have not.
    """
    own = network.state_dict()
    state = {pair.edm: pair.back(*(own[name] for name in pair.ours)).contiguous() for pair in _pairs(network, where)}
    return state | _filters(network)


def _taps(network: EdmAble) -> list[int]:
    return list(network.config["resample_filter"]) if isinstance(network, SongUNet) else [1, 1]


def _sizes(network: EdmAble) -> list[str]:
    """Names of the resolutions, highest first."""
    levels = range(len(network.config["block_out_channels"]))
    return [f"{network.config['sample_size'] >> i}x{network.config['sample_size'] >> i}" for i in levels]


def _filters(network: EdmAble) -> State:
    """EDM's buffers of resampling filters."""
    taps = torch.tensor(_taps(network), dtype=torch.float32)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    sizes = _sizes(network)
    blocks = [f"enc.{r}_down" for r in sizes[1:]] + [f"dec.{r}_up" for r in sizes[:-1]]
    names = [f"{block}.{part}" for block in blocks for part in ("conv0", "skip")]
    if isinstance(network, SongUNet) and network.config["encoder_type"] == "residual":
        names += [f"enc.{r}_aux_residual" for r in sizes[1:]]
    return {f"{name}.resample_filter": kernel.clone() for name in names}


def _blocks(network: EdmAble) -> Iterator[tuple[str, str, int, int]]:
    """EDM's name, part, level (in the order of the part) and index of each residual block."""
    sizes, layers = _sizes(network), network.config["layers_per_block"]
    for level, r in enumerate(sizes):
        if level:
            yield f"enc.{r}_down", "down", level, 0
        yield from ((f"enc.{r}_block{i}", "encoder", level, i) for i in range(layers))
    yield from ((f"dec.{sizes[-1]}_in{i}", "middle", 0, i) for i in (0, 1))
    for level, r in enumerate(reversed(sizes)):
        if level:
            yield f"dec.{r}_up", "up", level, 0
        yield from ((f"dec.{r}_block{i}", "decoder", level, i) for i in range(layers + 1))


def _pairs(network: EdmAble, where: Path) -> list[Pair]:
    """Every tensor of the network with its counterpart."""
    own = network.state_dict().keys()
    pairs = [pair for pair in (_song if isinstance(network, SongUNet) else _unet2d)(network) if pair.ours[0] in own]
    if more := set(own) - {name for pair in pairs for name in pair.ours}:
        raise UserError(f"{where}: {min(more)} has no counterpart in EDM: this {type(network).__name__} is none of its")
    return pairs


def _both(edm: str, ours: str) -> Iterator[Pair]:
    """Weight and bias of a module."""
    for name in ("weight", "bias"):
        yield Pair(f"{edm}.{name}", (f"{ours}.{name}",))


def _song(network: SongUNet) -> Iterator[Pair]:
    top = _sizes(network)[0]
    ends = {f"enc.{top}_conv": "conv_in", f"dec.{top}_aux_norm": "norm_out", f"dec.{top}_aux_conv": "conv_out"}
    names = SONG_TOP | ends
    for edm, ours in names.items():
        yield from _both(edm, ours)
    yield Pair("map_noise.freqs", ("time_proj.freqs",))
    for level, r in enumerate(_sizes(network)):
        yield Pair(f"enc.{r}_aux_residual.weight", (f"encoder.{level}.pyramid.conv.weight",))
        yield Pair(f"enc.{r}_aux_residual.bias", (f"encoder.{level}.pyramid.bias",))
    for edm, part, level, i in _blocks(network):
        path = {"down": f"encoder.{level}.resampling", "up": f"decoder.{level}.resampling", "middle": f"middle.{i}"}
        for theirs, ours in SONG_BLOCK.items():
            yield from _both(f"{edm}.{theirs}", f"{path.get(part, f'{part}.{level}.blocks.{i}')}.{ours}")


def _unet2d(network: UNet2DModel) -> Iterator[Pair]:
    for edm, ours in (ADM_TOP | {f"enc.{_sizes(network)[0]}_conv": "conv_in"}).items():
        yield from _both(edm, ours)
    yield Pair("map_label.weight", ("class_embedding.weight",), lambda t: (t.T,), lambda t: t.T)
    for edm, part, level, i in _blocks(network):
        at = {"encoder": f"down_blocks.{level}", "decoder": f"up_blocks.{level}", "middle": "mid_block"}.get(part)
        scaling = {"down": f"down_blocks.{level - 1}.downsamplers.0", "up": f"up_blocks.{level - 1}.upsamplers.0"}
        for theirs, ours in ADM_RESNET.items():
            yield from _both(f"{edm}.{theirs}", f"{scaling.get(part, f'{at}.resnets.{i}')}.{ours}")
        attention = f"{at}.attentions.{i}"
        yield from _both(f"{edm}.norm2", f"{attention}.group_norm")
        for name, axes in (("weight", (..., None, None)), ("bias", (...,))):
            yield _qkv(f"{edm}.qkv.{name}", tuple(f"{attention}.to_{part}.{name}" for part in "qkv"), axes)
            ours = f"{attention}.to_out.0.{name}"
            yield Pair(f"{edm}.proj.{name}", (ours,), lambda t: (t.flatten(1) if t.ndim > 1 else t,),
                       lambda t, axes=axes: t[axes])  # fmt: skip


def _qkv(edm: str, ours: tuple[str, ...], axes: tuple[Any, ...]) -> Pair:
    """One 1x1 convolution, in whose rows query, key and value of a channel lie beside each other, as three matrices."""

    def there(tensor: Tensor) -> tuple[Tensor, ...]:
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor
        return rows[0::3], rows[1::3], rows[2::3]

    return Pair(edm, ours, there, lambda q, k, v: torch.stack([q, k, v], dim=1).flatten(0, 1)[axes])
