"""CLIP score of DMD2 (``clip-dmd2``) and CLIP's image tower as a detector, through open_clip and a local folder.

The score is the plain mean cosine of image and ``"A photo depicts " + caption``: no factor 100 or 2.5, no clamp at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import sha256
from dmd2.core.precision import strict_float32
from dmd2.core.upload import upload
from eval.detectors.networks import FeatureNetwork
from eval.detectors.weights import registry
from eval.pixels.channels import normalised
from eval.pixels.resize import Geometry, resize_uint8, square_crop

PREFIX = "A photo depicts "
CHECKPOINTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PROTOCOL_GEOMETRY = Geometry("square-crop+lanczos-256")  # for captioned images; FID may use another, such as 512


def load_clip(model_dir: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and provenance of an open_clip folder (``open_clip_config.json`` and a checkpoint).

    A folder keeps the checkpoint's own preprocessing and activation, which a bare weight file would lose.

    Raises:
        UserError: the folder is incomplete, a listed checksum differs, or open_clip cannot read it.
    """
    config, listed = model_dir / "open_clip_config.json", registry().get(model_dir.name)
    checkpoint = next((model_dir / file for file in CHECKPOINTS if (model_dir / file).exists()), None)
    if not config.exists() or checkpoint is None:
        lacking = " or ".join(CHECKPOINTS) if config.exists() else config.name
        remedy = f" or {listed.remedy}" if listed else ""
        raise UserError(
            f"{model_dir.name}: {lacking} (no published checksum) is missing; put it into {model_dir}/{remedy}"
        )
    found = sha256(checkpoint)
    checksums = {file.file: file.sha256 for file in listed.files} if listed else {}
    expected = checksums.get(checkpoint.name)
    if expected not in (None, found):
        remedy = listed.remedy if listed else "copy it again"
        raise UserError(f"{checkpoint} has SHA-256 {found} instead of {expected}: delete it and {remedy}")
    try:
        model: Any = open_clip.create_model(f"local-dir:{model_dir}", require_pretrained=True, weights_only=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{model_dir}")
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(f"{model_dir} is not a readable open_clip model: {str(error).splitlines()[0]}") from error
    filter_name = model.visual.preprocess_cfg["interpolation"]
    if filter_name != "bicubic":
        raise UserError(f"{config} asks for {filter_name} resizing; the CLIP protocol here is bicubic")
    weights = {"weights": found, "config": sha256(config), "file": checkpoint.name, "verified": expected == found}
    resized = {"resize": "bicubic-uint8", "input": _side(model)}
    return model, tokenizer, {**weights, "open_clip": open_clip.__version__, **resized}


def _side(model: Any) -> int:
    size = model.visual.preprocess_cfg["size"]
    return size if isinstance(size, int) else size[0]


class ClipImages(FeatureNetwork):
    """Image embeddings (not normalised) of an open_clip folder, of the centre square of each image."""

    def __init__(self, model_dir: Path) -> None:
        model, tokenizer, about = load_clip(model_dir)
        about |= {"layer": "image embedding", "features": model.visual.output_dim, "classes": None}
        super().__init__(model_dir.name, {**about, "geometry": "square-crop"})
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.folder = model_dir

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings ``(n, d)`` after the model's own validation transform: bicubic on uint8, mean and SD."""
        side, settings, x = _side(self.model), self.model.visual.preprocess_cfg, square_crop(images)
        x = resize_uint8(x, side, "bicubic") if x.shape[-1] != side else x
        return self.model.encode_image(normalised(x.float() / 255, settings["mean"], settings["std"])), None


class ClipScore:
    """DMD2's CLIP score (``clip-dmd2``) for `eval.detectors.alignment`: the cosine of an image and its caption.

    Args:
        model_dir: folder of an open_clip model; the published numbers use ``clip-ViT-g-14``.
        device: where it runs.
        tower: the same folder as a detector, if it is loaded already: the network is then not loaded again.
    """

    TEXTS_AT_ONCE = 64  # captions in a call of the text tower
    geometry, reads_states = PROTOCOL_GEOMETRY, False

    def __init__(self, model_dir: Path, device: torch.device | str = "cpu", tower: ClipImages | None = None) -> None:
        self.folder = model_dir
        self.images: FeatureNetwork = tower or ClipImages(model_dir).on(device)
        self.model: Any = self.images.model
        self.tokenizer: Any = self.images.tokenizer
        self.name = f"clip-dmd2 ({model_dir.name})"
        scale = "mean cosine: no factor, no clamp"
        self.about = {**self.images.about, "prefix": PREFIX, "geometry": self.geometry.name, "scale": scale}

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids ``(n, context)`` of the prefixed captions, cut to the context with the end token last."""
        return self.tokenizer([PREFIX + caption for caption in captions])

    @torch.no_grad()
    def texts(self, captions: Sequence[str], _states: Tensor | None = None) -> Tensor:
        """Embeddings ``(n, d)`` of the prefixed captions, float32 on the CPU; a repeated caption is embedded once.

        CLIP has its own text tower: the states of the run's text encoder are not read.
        """
        distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        batches = self.tokens(list(distinct)).split(self.TEXTS_AT_ONCE)
        with strict_float32(self.images.device):
            rows = torch.cat([self.model.encode_text(upload(part, self.images.device)) for part in batches])
        rows = rows.float().cpu()
        return rows[[distinct[caption] for caption in captions]]
