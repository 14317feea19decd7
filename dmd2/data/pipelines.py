"""Tokenisers, text encoders and autoencoder of a text-to-image pipeline, as one object.

They come from a diffusers pipeline folder, listed and checksummed by ``data/pipelines/NAME/manifest.json``. Everything
here runs in float32, as in the paper's runs: SDXL's autoencoder overflows in float16.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified
from dmd2.data.sets import Rows, condition_of, load_shard
from dmd2.experiment.data_config import Data
from dmd2.networks.condition import Condition

# Text encoders whose states are understood; others would be read wrongly without an error.
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "BertModel")
TRANSFORMERS = {  # pipelines of flow-matching transformers, and how many text encoders each has
    "StableDiffusion3Pipeline": 3,
    "FluxPipeline": 2,
    "SanaPipeline": 1,
    "Lumina2Pipeline": 1,
    "ZImagePipeline": 1,
}
# Their states are those before a language model's last norm, which may be beyond float16's largest number.
WIDE = ("Lumina2Pipeline", "ZImagePipeline")
TEXT_PARTS = [f"{part}{suffix}" for suffix in ("", "_2", "_3") for part in ("tokenizer", "text_encoder")]
NULL, INDEX = "null.safetensors", "model_index.json"


def time_ids(pixels: int) -> Tensor:
    """SDXL's size condition of an uncropped square image, float32 ``(6,)``: original size, crop, target size."""
    return torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)


def belongs(path: Path, *suffixes: str) -> bool:
    """Whether a file of a part is read, of those `suffixes`: half-precision twins of weights are not, nor pickles."""
    twin = ".fp16" in path.name or ".non_ema" in path.name
    return path.suffix in (suffixes or (".safetensors", ".json", ".txt", ".model", ".jinja")) and not twin


def shift_of(autoencoder: Any) -> float:
    """What is taken off latents before they are scaled: 0 of Stable Diffusion and SDXL, not of SD3 and FLUX."""
    return getattr(autoencoder.config, "shift_factor", None) or 0.0


class Pipeline:
    """A pipeline folder; a part is verified and loaded when it is first used.

    Args:
        folder: of diffusers' layout. files: its manifest's entries, relative to `folder`. device: where parts run.
        length: tokens of a transformer's T5 or language model; None: as many as its pipeline takes by default.
    """

    def __init__(
        self,
        folder: Path,
        files: list[dict[str, Any]],
        device: torch.device | str = "cpu",
        length: int | None = None,
    ) -> None:
        self.folder, self.files, self.device, self.length = folder, files, torch.device(device), length

    @staticmethod
    def load(manifest: Path, device: torch.device | str = "cpu") -> Pipeline:
        """The pipeline that a manifest lists.

        Raises:
            UserError: the manifest is missing; a missing or changed part is reported when it is used.
        """
        record = read_json(manifest)
        return Pipeline(manifest.parent, record["files"], device, record.get("max_sequence_length"))

    def part(self, name: str) -> Path:
        """Folder of one part, after comparing the checksums of its files.

        Raises:
            UserError: the pipeline has no such part, or a file of it is missing or changed.
        """
        entries = [entry for entry in self.files if entry["path"].startswith(f"{name}/")]
        if not entries:
            raise UserError(f"{self.folder} has no {name}: put this part of the diffusers pipeline there")
        for entry in entries:
            verified(self.folder, entry)
        return self.folder / name

    @cached_property
    def index(self) -> dict[str, Any]:
        """What model_index.json says; nothing where there is none."""
        entries = [entry for entry in self.files if entry["path"] == INDEX]
        return read_json(verified(self.folder, entries[0])) if entries else {}

    @property
    def transformer(self) -> str | None:
        """Class of the pipeline of a flow-matching transformer; None for Stable Diffusion's UNets."""
        kind = self.index.get("_class_name")
        return kind if kind in TRANSFORMERS else None

    @property
    def towers(self) -> int:
        """Number of text encoders, such as 1 (SD 1.5) and 2 (SDXL)."""
        if self.transformer:
            return TRANSFORMERS[self.transformer]
        return 2 if any(entry["path"].startswith("text_encoder_2/") for entry in self.files) else 1

    @property
    def sized(self) -> bool:
        """Whether the image's size is a condition: of SDXL."""
        return self.towers == 2 and self.transformer is None

    @property
    def dtype(self) -> torch.dtype:
        """In which text states are stored."""
        return torch.bfloat16 if self.transformer in WIDE else torch.float16

    @cached_property
    def _text(self) -> list[tuple[Any, Any]]:
        """Tokeniser and encoder of every tower."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # of every tensor it loads
        found = []
        for suffix in ("", "_2")[: self.towers]:
            folder = self.part(f"text_encoder{suffix}")
            kind = read_json(folder / "config.json")["architectures"][0]
            if kind not in ENCODERS:
                raise UserError(
                    f"{folder} is a {kind}: only {', '.join(ENCODERS)} are understood without a {INDEX} of "
                    f"{', '.join(TRANSFORMERS)}"
                )
            model = getattr(transformers, kind).from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.part(f"tokenizer{suffix}"))
            found.append((tokenizer, model.eval().requires_grad_(False).to(self.device)))
        return found

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """States ``text`` ``(B, L, D)`` and, of two towers, ``pooled`` ``(B, P)``, float32; no size condition.

        One CLIP tower gives its last hidden state, without an attention mask (SD 1.5); two give their second-to-last
        ones side by side and the projection of the second (SDXL). BERT's states are zero where there is only padding.
        A transformer's states are those of its own pipeline, with ``text_mask`` where that has one.
        """
        if self.transformer:
            return self._transformer_text.encode(prompts)
        states, pooled = [], None
        for tokenizer, model in self._text:
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            tokens = tokenizer(prompts, return_tensors="pt", **length).to(self.device)
            if type(model).__name__ == "BertModel":
                mask = tokens.attention_mask
                states.append(model(tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None])
            elif self.towers == 1:
                states.append(model(tokens.input_ids).last_hidden_state)
            else:
                output = model(tokens.input_ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
                pooled = output[0]  # of the second tower in the end: the projected text embedding
        return Condition(text=torch.cat(states, dim=-1), pooled=pooled)

    @cached_property
    def _transformer_text(self) -> Any:
        from dmd2.data.transformer_text import TransformerText

        names = TEXT_PARTS[: 2 * self.towers]
        for name in names:
            self.part(name)
        return TransformerText(self.folder, self.index, names, self.length, self.device)

    def unconditional(self) -> Condition:
        """The empty prompt of one sample; zeros where the pipeline's model_index.json says so, or for two towers.

        A transformer's is what its pipeline takes in the place of a negative prompt.
        """
        if self.transformer:
            return self._transformer_text.encode([""], negative=True)
        empty = self.encode_prompts([""])
        if self.index.get("force_zeros_for_empty_prompt", self.towers == 2):
            assert empty.text is not None
            pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
            return Condition(text=torch.zeros_like(empty.text), pooled=pooled)
        return empty

    def stored(self, cond: Condition) -> Rows:
        """Tensors of a condition as sets keep them."""
        found = {name: value.cpu() for name, value in vars(cond).items() if value is not None}
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in found.items()}

    @cached_property
    def null(self) -> Condition:
        """The unconditional condition of one sample, from its file: no encoder is loaded for it."""
        entry = next(entry for entry in self.files if entry["path"] == NULL)
        return condition_of(load_shard(verified(self.folder, entry)))

    @cached_property
    def vae(self) -> Any:
        """The AutoencoderKL, or Sana's AutoencoderDC.

        Raises:
            UserError: it is of another class.
        """
        import diffusers

        kind = read_json(self.folder / "vae" / "config.json")["_class_name"]
        if kind not in ("AutoencoderKL", "AutoencoderDC"):
            raise UserError(f"{self.folder / 'vae'} is a {kind}: only AutoencoderKL and AutoencoderDC are understood")
        return self._autoencoder(getattr(diffusers, kind), "vae")

    @cached_property
    def vae_tiny(self) -> Any:
        """The tiny autoencoder (taesd, taesdxl), which decodes the same latents at a fraction of the cost."""
        from diffusers import AutoencoderTiny

        return self._autoencoder(AutoencoderTiny, "vae_tiny")

    def _autoencoder(self, kind: Any, name: str) -> Any:
        model = kind.from_pretrained(self.part(name), use_safetensors=True, torch_dtype=torch.float32)
        return model.eval().requires_grad_(False).to(self.device)

    @property
    def factor(self) -> int:
        """Pixels per side of a latent."""
        config = read_json(self.folder / "vae" / "config.json")
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    def image_size(self, data: Data) -> int:
        """Pixels per side of the images behind the tensors of a set."""
        return data.resolution * (self.factor if data.latents else 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, shifted and scaled as the autoencoder's config says, float32 ``(B, C, h, w)``.

        Sana's autoencoder has no posterior: its latents have no noise.

        Args:
            images: uint8, or float in [-1, 1], ``(B, 3, H, W)``. noise: standard normal of the latents' shape.
        """
        if images.dtype == torch.uint8:
            images = images.float().div(127.5).sub(1)
        found = self.vae.encode(images.to(self.device))
        if "latent" in found:
            z = found.latent
        else:
            z = found.latent_dist.mean + found.latent_dist.std * noise.to(self.device)
        return (z - shift_of(self.vae)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor, decoder: str = "vae") -> Tensor:
        """Images about [-1, 1], float32 ``(B, 3, H, W)``; the gradient flows. `decoder` is ``vae`` or ``vae_tiny``."""
        model = getattr(self, decoder)
        return model.decode(latents.float() / model.config.scaling_factor + shift_of(model)).sample
