"""Networks of NVlabs' EDM and released DMD2 students as diffusers folders, and back to EDM's names.

A source is one of NVlabs' pickles, which is read without running anything of it (`edm_pickle`); the
``pytorch_model.bin`` of a released DMD2 run; or a safetensors file. Those on class labels name tensors
``model.<EDM's name>``; students of Stable Diffusion have the names of diffusers' UNet, or are a LoRA (`lora_format`).
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.convert.edm_names import AUGMENTATION, EdmAble, State, check_fits, empty, from_edm, infer, to_edm
from dmd2.convert.edm_pickle import read_edm
from dmd2.convert.kohya import from_kohya, is_kohya, merge
from dmd2.core.errors import UserError
from dmd2.core.files import atomic_folder, read_json
from dmd2.data.inert_pickle import foreign, shown
from dmd2.data.sets import save_shard
from dmd2.networks.song_unet import SongUNet

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PREFIX = "model."  # of EDM's network in its preconditioning
KINDS = ".pkl (NVlabs), .bin or .pt (a state dict written by torch.save) or .safetensors"


def convert(source: Path, folder: Path, base: Path | None = None) -> Path:
    """Write the network of `source` as a diffusers folder, whose path is returned; an earlier conversion is replaced.

    Args:
        base: for a student of Stable Diffusion, the diffusers folder of its teacher's UNet.

    Raises:
        UserError: `source` cannot be read, is not such a network, or is not whole; or `folder` holds something else.
    """
    network: EdmAble | UNet2DConditionModel
    if base is None:
        network = _edm_network(source)
    else:
        network = empty_unet(base)
        network.load_state_dict(student_state(source, network, base), assign=True)
    ours = folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS}
    with atomic_folder(folder, ours, "exists and is no network folder: name a new folder") as temporary:
        network.save_pretrained(temporary, safe_serialization=True, max_shard_size="100GB")
    return folder


def _edm_network(source: Path) -> EdmAble:
    """The network in a file of EDM's; the settings in a pickle must agree with the shapes of its tensors."""
    state, said = _read(source)
    bare = _bare(state)
    config = infer(bare, source)
    found = {
        "model_type": {"UNet2DModel": "DhariwalUNet"}.get(config["_class_name"], config["_class_name"]),
        "img_resolution": config["sample_size"],
        "img_channels": config["in_channels"],
        "label_dim": config["num_class_embeds"] or 0,
    }
    for name, value in said.items():
        if type(value) is not type(found[name]) or value != found[name]:
            its = f"its tensors are those of {found[name]}: the file is not whole"
            raise UserError(f"{source}: ema.{name} is {shown(value)} but {its}")
    if said and config["in_channels"] != config["out_channels"]:
        raise UserError(f"{source}: the network makes {config['out_channels']} channels of {config['in_channels']}")
    try:
        network = empty(config)
    except ValueError as error:
        raise UserError(f"{source}: there is no network of these shapes ({error})") from None
    network.load_state_dict(from_edm(bare, network, source), assign=True)
    if AUGMENTATION in bare:
        print(f"{source}: {AUGMENTATION} is left out: it adds nothing without augmentation labels", file=sys.stderr)
    return network


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a diffusers folder without memory for its weights.

    Raises:
        UserError: its config.json is missing, or of another class.
    """
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{folder / CONFIG} is of a {config.get('_class_name')} and no UNet2DConditionModel")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def student_state(source: Path, network: nn.Module, base: Path | None = None) -> State:
    """Weights of a released checkpoint in the key names of `network`, all of them and in its shapes, float32.

    The file has EDM's names (ImageNet, CIFAR-10) or those of `network` itself (the UNets of Stable Diffusion), or it
    is a LoRA in kohya's format, which is merged onto the weights in the diffusers folder `base`.

    Raises:
        UserError: `source` cannot be read, or does not fit `network`.
    """
    state, _ = _read(source)
    if is_kohya(state):
        if base is None:
            raise UserError(f"{source} is a LoRA: it needs the weights that it is for, a diffusers folder of them")
        weights = UNet2DConditionModel.from_pretrained(base, use_safetensors=True).float().state_dict()
        return merge(weights, from_kohya(state, weights, source))
    own = network.state_dict()
    if isinstance(network, UNet2DModel | SongUNet) and not own.keys() & state.keys():
        return from_edm(_bare(state), network, source)
    if any(".lora_A." in name for name in state):
        raise UserError(f"{source} is a checkpoint of a LoRA training: take the file in kohya's format made of it")
    check_fits(state, own, network, source)
    return state


def export_edm(folder: Path, file: Path) -> Path:
    """Write the network of a diffusers folder as a safetensors file with EDM's names; returns its path.

    Raises:
        UserError: `folder` holds no network that EDM has, or it is not whole.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no whole diffusers folder with {CONFIG} and {WEIGHTS} ({error})") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in ("UNet2DModel", "SongUNet"):
        raise UserError(f"{folder / CONFIG}: EDM has no {kind}, only what is here a UNet2DModel (its ADM) or SongUNet")
    try:
        network = empty({**config, "sample_size": int(config["sample_size"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is not the config of a network that EDM has ({error})") from None
    check_fits(weights, network.state_dict(), network, folder / WEIGHTS)
    network.load_state_dict(weights, assign=True)
    state = to_edm(network, folder)
    for key, value in empty(infer(state, folder)).config.items():  # of EDM's network with these tensors
        found, wanted = network.config.get(key), value
        if isinstance(value, list | tuple) and isinstance(found, list | tuple):
            found, wanted = list(found), list(value)
        if found != wanted and key != "dropout" and not key.startswith("_"):
            raise UserError(f"{folder / CONFIG}: {key} is {found}, in a network that EDM has it would be {wanted}")
    save_shard(file, {f"{PREFIX}{name}": tensor for name, tensor in state.items()})
    return file


def _read(source: Path) -> tuple[State, dict[str, Any]]:
    """Tensors of a file, float32 and finite, each with memory of its own; and the settings that a pickle records."""
    if not source.is_file():
        raise UserError(f"{source} is {'no file' if source.exists() else 'missing'}: give a file of kind {KINDS}")
    said: dict[str, Any] = {}
    if source.suffix == ".pkl":
        said, state = read_edm(source)
    elif source.suffix in (".bin", ".pt", ".pth"):
        state = _torch_file(source)
    elif source.suffix == ".safetensors":
        try:
            state = load_file(source)
        except SafetensorError as error:
            raise UserError(f"{source} is truncated or no safetensors file ({error}): download it again") from None
    else:
        raise UserError(f"{source} has no suffix that says what it is: {KINDS}")
    pointers: set[int] = set()
    for name, tensor in state.items():
        state[name] = _clean(source, name, tensor, pointers)
    return state, said


def _torch_file(source: Path) -> dict[str, Any]:
    """A dict written by ``torch.save``, read with weights_only."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > source.stat().st_size:
                raise UserError(f"{source} is a compressed archive, which torch.save does not write: refused")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader's own exceptions are of many types
        if name := foreign(error):
            raise UserError(f"{source} would run {name}: refused; a state dict holds only tensors") from None
        detail = (str(error) or type(error).__name__).splitlines()[0].strip()[:200]
        raise UserError(f"{source} is truncated or no plain state dict ({detail}): download it again") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{source} holds a {type(state).__name__} and no state dict with names")
    return dict(state)


def _clean(source: Path, name: str, tensor: Any, pointers: set[int]) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise UserError(f"{source}: {name} is a {type(tensor).__name__} and no plain tensor")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"{source}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')} instead of float32")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{source}: {name} has NaN or infinite values: the file is damaged or its training diverged")
    shared = tensor.untyped_storage().data_ptr() in pointers
    pointers.add(tensor.untyped_storage().data_ptr())
    return (tensor.clone() if shared else tensor.detach()).float()


def _bare(state: State) -> State:
    """EDM's names without the prefix."""
    prefixed = all(name.startswith(PREFIX) for name in state)
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()} if prefixed else state
