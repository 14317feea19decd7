"""EDM's names of tensors and ours, both ways: ADM as diffusers' `UNet2DModel`, DDPM++ and NCSN++ as our `SongUNet`.

EDM's names are those of a file without the leading ``model.``. The tensors are the same up to the layout that
diffusers wants, so both ways are exact. EDM's files also hold the resampling filters, which are constants here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dmd2.core.errors import UserError
from dmd2.networks.song_unet import SongUNet

State: TypeAlias = dict[str, Tensor]
EdmAble: TypeAlias = "UNet2DModel | SongUNet"

# Modules by EDM's name and ours: of the network, within a residual block, and the places of these blocks, whose level
# counts from the highest resolution in the encoder and from the lowest in the decoder.
ADM = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2", "map_label": "class_embedding",
       "enc.{top}_conv": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out"}  # fmt: skip
ADM_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
             "skip": "conv_shortcut"}  # fmt: skip
ADM_ATTENTION = {"norm2": "group_norm", "qkv": "to_qkv", "proj": "to_out.0"}  # to_qkv: to_q, to_k and to_v
ADM_PLACES = {"encoder": "down_blocks.{level}.resnets.{i}", "down": "down_blocks.{above}.downsamplers.0",
              "decoder": "up_blocks.{level}.resnets.{i}", "up": "up_blocks.{above}.upsamplers.0",
              "middle": "mid_block.resnets.{i}"}  # fmt: skip
SONG = {"map_layer0": "embedding.0", "map_layer1": "embedding.2", "map_label": "class_embedding",
        "enc.{top}_conv": "conv_in", "dec.{top}_aux_norm": "norm_out", "dec.{top}_aux_conv": "conv_out"}  # fmt: skip
SONG_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "projection", "norm1": "norm2", "conv1": "conv2",
              "skip": "shortcut", "norm2": "attention.norm", "qkv": "attention.qkv",
              "proj": "attention.out"}  # fmt: skip
SONG_PLACES = {"encoder": "encoder.{level}.blocks.{i}", "down": "encoder.{level}.resampling",
               "decoder": "decoder.{level}.blocks.{i}", "up": "decoder.{level}.resampling",
               "middle": "middle.{i}"}  # fmt: skip
AUGMENTATION = "map_augment.weight"  # of no effect without augmentation labels, and not converted


def infer(state: State, where: Path) -> dict[str, Any]:
    """Config of our network, with its ``_class_name``, inferred from the names and shapes of EDM's tensors.

    Raises:
        UserError: these are not the tensors of such a network, or `UNet2DModel` cannot express it.
    """
    found = [re.match(r"enc\.(\d{1,5})x\1_(?:block(\d{1,4})\.)?", name) for name in state]
    sizes = sorted({int(match[1]) for match in found if match}, reverse=True)
    blocks = [int(match[2]) for match in found if match and match[2]]
    top = f"{sizes[0]}x{sizes[0]}" if sizes else ""
    song = any(name.startswith(f"dec.{top}_aux_conv.") for name in state)
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

    width, channels, *_ = shape(f"enc.{top}_conv.weight")
    config = {
        "sample_size": sizes[0],
        "in_channels": channels,
        "out_channels": shape(f"dec.{top}_aux_conv.weight" if song else "out_conv.weight")[0],
        "layers_per_block": max(blocks) + 1,
        "block_out_channels": [shape(f"enc.{r}x{r}_block0.conv0.weight")[0] for r in sizes],
        "num_class_embeds": shape("map_label.weight", 2)[1] if any("map_label." in name for name in state) else None,
    }
    attention = [r for r in sizes if any(re.match(rf"enc\.{r}x{r}_block\d+\.(norm2|qkv|proj)\.", n) for n in state)]
    embedding, noise = shape("map_layer0.weight", 2)
    if not song:
        return _adm(config, attention, noise, embedding, where)
    taps = next((tensor.shape[-1] for name, tensor in state.items() if name.endswith(".resample_filter")), 2)
    return {
        "_class_name": "SongUNet",
        **config,
        "model_channels": width,
        "attention_resolutions": attention,
        "noise_channels": noise,
        "embedding_channels": embedding,
        "embedding_type": "fourier" if "map_noise.freqs" in state else "positional",
        "encoder_type": "residual" if any("_aux_residual." in name for name in state) else "standard",
        "resample_filter": [1, 3, 3, 1] if taps == 4 else [1, 1],
    }


def _adm(config: dict[str, Any], attention: list[int], noise: int, embedding: int, where: Path) -> dict[str, Any]:
    """The config of a `UNet2DModel` that is this ADM, if there is one."""
    widths = config["block_out_channels"]
    sizes = [config["sample_size"] >> level for level in range(len(widths))]
    attend = [r in attention for r in sizes]
    if bad := [width for width in widths if width < 128 or width % 32]:
        raise UserError(
            f"{where}: a level of {bad[0]} channels cannot be a UNet2DModel, whose norms have 32 groups (EDM has fewer "
            "below 128 channels): only multiples of 32 from 128 on"
        )
    attending = [width for width, on in zip(widths, attend, strict=True) if on]
    if bad := [width for width in (*attending, widths[-1]) if width % 64]:  # the middle attends, too
        raise UserError(f"{where}: attention over {bad[0]} channels cannot be a UNet2DModel, whose heads have 64")
    if noise != widths[0] or embedding != 4 * widths[0]:
        raise UserError(
            f"{where}: a time embedding of {noise} and {embedding} channels cannot be a UNet2DModel, which has "
            f"{widths[0]} and {4 * widths[0]} beside a first level of {widths[0]}"
        )
    return {
        "_class_name": "UNet2DModel",
        **config,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attend],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attend)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


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
    meta = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    given = {name: tensor for name, tensor in state.items() if name != AUGMENTATION}
    check_fits(given, _edm_state(meta, network, where), network, where)
    for name, tensor in _filters(network).items():
        if not torch.allclose(state[name].float(), tensor):
            raise UserError(f"{where}: {name} is not the filter {_taps(network)}, which the network has instead")
    found: State = {}
    for edm, ours in _names(network, where).items():
        found |= _split(ours, state[edm]) if isinstance(network, UNet2DModel) else {ours: state[edm]}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def to_edm(network: EdmAble, where: Path) -> State:
    """The network's tensors in EDM's names and layout, with the filters; an augmentation layer is gone for good.

    Raises:
        UserError: the network has tensors that EDM's have not.
    """
    return _edm_state(network.state_dict(), network, where)


def check_fits(given: State, wanted: State, network: nn.Module, where: Path) -> None:
    """Compare names and shapes of given tensors with those of a network.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape.
    """
    kind = f"a {type(network).__name__} of its settings"
    for names, text in (
        (wanted.keys() - given.keys(), "is missing"),
        (given.keys() - wanted.keys(), f"does not belong to {kind}"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where}: {min(names)} {text}{more}: the file is not whole, or of another network")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            found, shape = tuple(given[name].shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} has shape {found} instead of {shape}")


def _edm_state(own: State, network: EdmAble, where: Path) -> State:
    names, adm = _names(network, where), isinstance(network, UNet2DModel)
    state = {edm: (_joined(ours, own) if adm else own[ours]).contiguous() for edm, ours in names.items()}
    return state | _filters(network)


def _split(ours: str, tensor: Tensor) -> State:
    """A tensor of ADM in the layout of `UNet2DModel`.

    Class embeddings are rows; attention has matrices instead of 1x1 convolutions; query, key and value, whose rows
    alternate in ADM, are three tensors.
    """
    if ours == "class_embedding.weight":
        return {ours: tensor.T}
    if ".to_" in ours:
        tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
    return {name: tensor[i::3] for i, name in enumerate(_parts(ours))} if "to_qkv" in ours else {ours: tensor}


def _joined(ours: str, own: State) -> Tensor:
    """A tensor of `UNet2DModel` in the layout of ADM: the inverse of `_split`."""
    parts = [own[name] for name in _parts(ours)]
    if ours == "class_embedding.weight":
        return parts[0].T
    tensor = parts[0] if len(parts) == 1 else torch.stack(parts, dim=1).flatten(0, 1)
    return tensor[..., None, None] if ".to_" in ours and tensor.ndim > 1 else tensor


def _parts(ours: str) -> list[str]:
    return [ours.replace("to_qkv", f"to_{part}") for part in "qkv"] if "to_qkv" in ours else [ours]


def _taps(network: EdmAble) -> list[int]:
    return list(network.config["resample_filter"]) if isinstance(network, SongUNet) else [1, 1]


def _sizes(network: EdmAble) -> list[str]:
    """Names of the resolutions, highest first."""
    levels = range(len(network.config["block_out_channels"]))
    return [f"{network.config['sample_size'] >> i}x{network.config['sample_size'] >> i}" for i in levels]


def _filters(network: EdmAble) -> State:
    """EDM's buffers of resampling filters."""
    taps, sizes = torch.tensor(_taps(network), dtype=torch.float32), _sizes(network)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    blocks = [f"enc.{r}_down" for r in sizes[1:]] + [f"dec.{r}_up" for r in sizes[:-1]]
    names = [f"{block}.{part}" for block in blocks for part in ("conv0", "skip")]
    if isinstance(network, SongUNet) and network.config["encoder_type"] == "residual":
        names += [f"enc.{r}_aux_residual" for r in sizes[1:]]
    return {f"{name}.resample_filter": kernel.clone() for name in names}


def _names(network: EdmAble, where: Path) -> dict[str, str]:
    """EDM's name and ours of every tensor; ``to_qkv`` stands for three.

    Raises:
        UserError: the network has tensors that EDM's have not.
    """
    own, sizes, song = network.state_dict().keys(), _sizes(network), isinstance(network, SongUNet)
    modules = {edm.format(top=sizes[0]): ours for edm, ours in (SONG if song else ADM).items()}
    for edm, place in _blocks(sizes, network.config["layers_per_block"], SONG_PLACES if song else ADM_PLACES):
        modules |= {
            f"{edm}.{theirs}": f"{place}.{ours}" for theirs, ours in (SONG_BLOCK if song else ADM_BLOCK).items()
        }
        if not song:
            attention = place.replace("resnets", "attentions")
            modules |= {f"{edm}.{theirs}": f"{attention}.{ours}" for theirs, ours in ADM_ATTENTION.items()}
    names = {f"{edm}.{kind}": f"{ours}.{kind}" for edm, ours in modules.items() for kind in ("weight", "bias")}
    names["map_noise.freqs"] = "time_proj.freqs"
    for level, r in enumerate(sizes):
        names[f"enc.{r}_aux_residual.weight"] = f"encoder.{level}.pyramid.conv.weight"
        names[f"enc.{r}_aux_residual.bias"] = f"encoder.{level}.pyramid.bias"
    names = {edm: ours for edm, ours in names.items() if _parts(ours)[0] in own}
    if more := set(own) - {part for ours in names.values() for part in _parts(ours)}:
        raise UserError(f"{where}: {min(more)} has no counterpart in EDM: this {type(network).__name__} is none of its")
    return names


def _blocks(sizes: list[str], layers: int, places: dict[str, str]) -> Iterator[tuple[str, str]]:
    """EDM's name and ours of every residual block."""
    yield from ((f"dec.{sizes[-1]}_in{i}", places["middle"].format(i=i)) for i in (0, 1))
    halves = {"enc": (sizes, "encoder", "down", layers), "dec": (sizes[::-1], "decoder", "up", layers + 1)}
    for edm, (order, in_level, resampling, count) in halves.items():
        for level, r in enumerate(order):
            if level:
                yield f"{edm}.{r}_{resampling}", places[resampling].format(level=level, above=level - 1)
            for i in range(count):
                yield f"{edm}.{r}_block{i}", places[in_level].format(level=level, i=i)
