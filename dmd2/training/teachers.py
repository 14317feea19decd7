"""The frozen teacher of a run: its network, the denoiser around it, and the condition that guidance leads away from."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import safe_open

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified
from dmd2.core.rng import stream
from dmd2.data.pipelines import Pipeline, time_ids
from dmd2.experiment.config import Data
from dmd2.experiment.run_inputs import pipeline_manifest
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser, EdmDenoiser, EpsDenoiser, Network
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.song_unet import SongUNet
from dmd2.networks.transformers.family import FAMILIES

NETWORKS: dict[str, type[Network]] = {kind.__name__: kind for kind in (UNet2DModel, SongUNet, UNet2DConditionModel)}


def wrap(network: Network, parameterisation: str, precision: Any = "fp32", **flow: Any) -> Denoiser:
    """The denoiser of a network: ``edm``, ``eps`` or ``flow``, with the settings `Teacher.flow` of a flow."""
    if parameterisation == "flow":
        return FlowDenoiser(network, precision, **flow)
    return (EdmDenoiser if parameterisation == "edm" else EpsDenoiser)(network, precision)


def network_class(kind: str) -> type[Network]:
    """A class of networks by its name in a diffusers config.

    Raises:
        UserError: there is none.
    """
    if kind in FAMILIES:
        return getattr(diffusers, kind)
    if kind not in NETWORKS:
        raise UserError(f"there is no network class {kind}: {', '.join([*NETWORKS, *FAMILIES])}")
    return NETWORKS[kind]


def build_network(spec: dict[str, Any], seed: int) -> Network:
    """A freshly initialised diffusers UNet; the draw of its weights depends on `seed` only.

    Raises:
        UserError: its class refuses the config.
    """
    kind = spec.get("_class_name", "UNet2DModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"{seed}/network").initial_seed())
        try:
            return network_class(kind).from_config({k: v for k, v in spec.items() if k != "_class_name"})
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"teacher.network: no {kind} can be built of it ({why})") from error


def unet_folder(manifest: Path) -> Path:
    """Folder of the network that a teacher's manifest lists.

    Raises:
        UserError: the manifest is missing, or a file of the network is missing or was changed.
    """
    teacher = read_json(manifest)
    for file in teacher["files"]:
        verified(manifest.parent, file)
    return Path(os.path.normpath(manifest.parent / teacher["folder"]))


def stored_dtype(manifest: Path) -> torch.dtype:
    """The 16-bit dtype of all weights that a manifest lists, or else float32, from the headers of the files alone."""
    kinds: set[str] = set()
    for entry in read_json(manifest)["files"]:
        if not entry["path"].endswith(".safetensors"):
            continue
        with safe_open(manifest.parent / entry["path"], "pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get("".join(kinds), torch.float32)


def load_teacher(
    manifest: Path, parameterisation: str, precision: Any = "fp32", as_stored: bool = False, **flow: Any
) -> Denoiser:
    """The teacher a manifest lists, verified, frozen, in eval mode, in float32.

    With `as_stored` parameters stay mapped from their file in the dtype that they have there, and take no host memory;
    who asks for it must give them the dtype to train in.

    Raises:
        UserError: a file is missing or does not match its checksum, the network's class is unknown, or the weights are
            not those of its config.
    """
    folder, kind = unet_folder(manifest), read_json(manifest)["class"]
    dtype = stored_dtype(manifest) if as_stored else torch.float32
    # Of the two names of this option, old versions of diffusers know one alone, and new ones warn of it.
    options = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    try:
        network, found = network_class(kind).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: the weights do not fit config.json ({str(error).splitlines()[0]})") from None
    if missing := found["missing_keys"]:  # diffusers would draw them
        raise UserError(f"{folder}: the weights lack {len(missing)} tensors of config.json, such as {min(missing)}")
    for buffer in network.buffers():  # a frequency, for example, of which sines are taken
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the paper trains without dropout, whatever its teacher was trained with
    return wrap(network, parameterisation, precision, **flow).eval().requires_grad_(False)


def null_condition(data: Data, guidance: float, network: Network) -> Condition | None:
    """Unconditional condition of one sample for a teacher's network; None if unguided.

    For classes it is the index after the last one, for text what the pipeline says, with SDXL's sizes unchanged.

    Raises:
        UserError: the pipeline's manifest is missing, or the network has no such class.
    """
    if guidance <= 1:
        return None
    embeds, needed = network.config.get("num_class_embeds", data.classes + 1), data.classes + 1
    if data.labelled and embeds != needed:  # of a teacher that was adopted, which no base describes
        raise UserError(
            f"a guidance scale of {guidance:g} needs a teacher with num_class_embeds {needed}, data.classes and one "
            f"for no class, and this one has {embeds}: set the scale to 1, or put another teacher in place"
        )
    return unconditional(data)


def unconditional(data: Data) -> Condition:
    """The condition that guidance leads away from; a teacher trained here sees it in the place of dropped ones."""
    manifest = pipeline_manifest(data)
    if manifest is None:
        return Condition(labels=torch.tensor([data.classes]))
    pipeline = Pipeline.load(manifest)
    null = pipeline.null
    return replace(null, time_ids=time_ids(pipeline.image_size(data))[None]) if pipeline.sized else null
