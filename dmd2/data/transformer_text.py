"""Text states of flow-matching transformers, by the diffusers pipeline of their family.

The pipeline knows its prefixes, chat templates, lengths and what it takes where there is no negative prompt.
"""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from dmd2.networks.condition import Condition


class TransformerText:
    """Text encoders of a pipeline.

    Args:
        folder: the pipeline's. index: what its model_index.json says. parts: tokenizers and text encoders.
        length: tokens of its T5 or language model; None: as many as the pipeline takes by default.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], parts: list[str], length: int | None, device: torch.device
    ) -> None:
        self.kind, self.device = index["_class_name"], device
        others = {name: None for name in index if not name.startswith("_") and name not in parts}
        diffusers.utils.logging.set_verbosity_error()  # it prints the end of every prompt that it cuts
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        self.pipe = getattr(diffusers, self.kind).from_pretrained(
            folder, **others, use_safetensors=True, local_files_only=True
        )
        self.pipe.to(device, torch.float32)
        default = inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default
        self.length: int = length or default

    @torch.no_grad()
    def encode(self, prompts: list[str], negative: bool = False) -> Condition:
        """States of prompts; with `negative`, what the pipeline takes where no negative prompt is given.

        ``text`` ``(B, L, D)``, float32, with ``pooled`` ``(B, P)`` of SD3 and FLUX and ``text_mask`` of the others.
        """
        options: dict[str, Any] = {"device": self.device, "max_sequence_length": self.length}
        prompts = list(prompts)  # Z-Image's pipeline writes into the list
        if self.kind == "FluxPipeline":  # a network without classifier-free guidance: no negative prompt either
            text, pooled, _ = self.pipe.encode_prompt(prompts, **options)
            return Condition(text=text, pooled=pooled)
        options["do_classifier_free_guidance"] = negative
        if self.kind == "StableDiffusion3Pipeline":
            found = self.pipe.encode_prompt(prompts, None, None, **options)
            return Condition(text=found[negative], pooled=found[2 + negative])
        if self.kind == "ZImagePipeline":
            return self._padded(self.pipe.encode_prompt(prompts, **options)[negative])
        if self.kind == "SanaPipeline":  # an instruction before each prompt, which only its call has as a default
            named = inspect.signature(type(self.pipe).__call__).parameters
            options["complex_human_instruction"] = named["complex_human_instruction"].default
        text, mask = self.pipe.encode_prompt(prompts, **options)[2 * negative :][:2]
        return Condition(text=text, text_mask=mask.bool())

    def _padded(self, found: list[Tensor]) -> Condition:
        """States of captions of different lengths ``(L_i, D)`` as rows of one length."""
        text = torch.stack([pad(states, (0, 0, 0, self.length - len(states))) for states in found])
        kept = torch.tensor([len(states) for states in found], device=text.device)
        return Condition(text=text, text_mask=torch.arange(self.length, device=text.device) < kept[:, None])
