"""Batches of a training iteration and AdamW's states as shapes on PyTorch's meta device, without numbers or memory."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.core.rng import Draws
from dmd2.experiment.checks.transformers import SHAPES
from dmd2.experiment.config import Optim
from dmd2.experiment.data_config import Data
from dmd2.method.batches import Batch, Batches
from dmd2.networks.condition import Condition
from dmd2.training.optimiser import Optimiser
from dmd2.training.quantised import CODES_PER_SCALE, quantises

META = torch.device("meta")
TOKENS, SIZES = 77, 6  # of a caption, and numbers in SDXL's time_ids


@dataclass(frozen=True)
class ShapeDraws(Draws):
    """Draws without numbers; a step shared by the batch is the last one, which costs most."""

    def _stream(self, name: str) -> Any:
        return None  # the meta device has no generators

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """See `Draws.shared_integer`."""
        return high

    def shuffled(self, name: str, size: int) -> Tensor:
        """See `Draws.shuffled`."""
        return torch.empty((self.stop - self.start,), dtype=torch.long, device=META)


def condition_of(data: Data, network: Any, count: int) -> Condition:
    """A condition of `count` samples, of the sizes that the network's config and the data section name."""
    if data.text is None:
        return Condition(labels=torch.empty(count, dtype=torch.long, device=META) if data.labelled else None)
    config: Mapping[str, Any] = network.config
    if (shape := SHAPES.get(type(network).__name__)) is not None:
        pipeline, pooled = data.text.pipeline, None
        length = shape.clip + (pipeline.max_sequence_length or shape.tokens)
        if pipeline.encoder is not None:
            length = pipeline.tokens
        elif shape.classes != shape.text:
            pooled = torch.empty(count, config[shape.classes], device=META)
        return Condition(text=torch.empty(count, length, config[shape.text], device=META), pooled=pooled)
    text = torch.empty(count, TOKENS, config["cross_attention_dim"], device=META)
    if config.get("addition_embed_type") != "text_time":
        return Condition(text=text)
    width = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
    sizes = (torch.empty(count, size, device=META) for size in (width, SIZES))
    return Condition(None, text, *sizes)


class ShapeBatches(Batches):
    """Equal micro-batches of one process, out of `ShapeDraws`."""

    def some(self, iteration: int, count: int) -> Iterator[Batch]:
        """The first `count` micro-batches of an iteration."""
        total = max(self.cfg.optim.batch, count * self.micro_batch)
        for i in range(count):
            start = i * self.micro_batch
            yield self.slice_of(ShapeDraws(0, iteration, total, start, start + self.micro_batch, META))


class ShapeOptimiser(Optimiser):
    """AdamW's memory: two moments per parameter. Its fused update needs nothing more."""

    def __init__(self, modules: Iterable[nn.Module | None], cfg: Optim, lr: float) -> None:
        super().__init__(modules, cfg.model_copy(update={"states": "fp32"}), lr)  # 8-bit states need no package here
        self.moments = [moment for p in self.parameters for _ in range(2) for moment in _moment(p, cfg.states)]

    def step(self, it: int) -> Tensor:
        """Clear the gradients, as after an update."""
        for denoiser in self.denoisers:
            denoiser.hand_over()
        self.adamw.zero_grad(set_to_none=True)
        return torch.empty((), device=META)


def _moment(parameter: Tensor, states: str) -> list[Tensor]:
    """A moment as AdamW keeps it: float32, or codes and a scale for every block of them."""
    if states == "fp32" or not quantises(parameter.shape):
        return [torch.empty_like(parameter)]
    codes = torch.empty_like(parameter, dtype=torch.uint8)
    return [codes, torch.empty(parameter.numel() // CODES_PER_SCALE, device=META)]
