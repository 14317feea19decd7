"""What the workbench needs of a class of diffusers' transformers: its velocity, its image tokens, its adapters.

A family is one file here with a subclass of `Family`, and one entry in `dmd2.experiment.checks.transformers.SHAPES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.experiment.checks.transformers import SHAPES as FAMILIES
from dmd2.networks.condition import Condition

REFINERS = ("noise_refiner", "context_refiner")  # blocks before those of the joint sequence
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Family(ABC):
    """One class of transformers.

    lists: names of its lists of blocks in the order of a pass. targets: ends of the names, within blocks, of the
    projections that low-rank factors go to. pipeline: diffusers' class that samples it. guidance_embed: what a network
    with a guidance embedder is told. lengths_vary: whether the shapes of a pass depend on the lengths of its captions.
    """

    guidance_embed: float
    pipeline: ClassVar[str]

    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    targets: ClassVar[tuple[str, ...]] = ATTENTION
    lengths_vary: ClassVar[bool] = False

    @property
    def unguided(self) -> float:
        """The ``guidance_scale`` that is no classifier-free guidance to its pipeline."""
        return 1.0

    @abstractmethod
    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """``v = n - x0`` at noisy latents ``(B, C, H, W)`` and levels ``(B,)``, float32; the result is like ``x``."""

    def image_tokens(self, hidden: Tensor, count: int, cond: Condition) -> Tensor:
        """The `count` tokens of the image ``(B, count, D)``, row by row, of what a block hands on."""
        return hidden

    def patch(self, network: Any) -> int:
        """Side of the square of latents that is one token."""
        return network.config.patch_size

    def width(self, network: Any) -> int:
        """Features D of a token."""
        return network.config.num_attention_heads * network.config.attention_head_dim

    def has_factors(self, path: str) -> bool:
        """Whether the projection at a path of the network gets low-rank factors: those of its blocks alone."""
        return path.startswith(tuple(f"{name}." for name in (*self.lists, *REFINERS))) and path.endswith(self.targets)

    def blocks(self, network: Any) -> list[nn.Module]:
        """All blocks in the order of a pass."""
        return [block for name in self.lists for block in getattr(network, name)]

    def features(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition, taps: Sequence[int]) -> Tensor:
        """Image tokens after each of the blocks `taps`, in ascending order, as grids ``(B, D, H / patch, W / patch)``.

        They are joined along D. Blocks after the last one are not run.
        """
        whole = {name: getattr(network, name) for name in self.lists}
        run = {name: [*blocks] for name, blocks in whole.items()}
        *early, (name, index) = (self._place(network, tap) for tap in taps)
        heard = [_Heard(whole[name][index]) for name, index in early]
        for (where, place), block in zip(early, heard, strict=True):
            run[where][place] = block
        run[name][index + 1 :] = [_Stop()]
        network._modules.update({name: nn.ModuleList(blocks) for name, blocks in run.items()})
        try:
            self.velocity(network, x, sigma, cond)
        except _Stopped as stopped:
            hidden = [*(block.hidden for block in heard), stopped.hidden]
        finally:
            network._modules.update(whole)
        rows, columns = (side // self.patch(network) for side in x.shape[-2:])
        tokens = torch.cat([self.image_tokens(one, rows * columns, cond) for one in hidden], dim=2)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def _place(self, network: Any, tap: int) -> tuple[str, int]:
        """List and index of block `tap`."""
        for name in self.lists:
            if tap < len(getattr(network, name)):
                return name, tap
            tap -= len(getattr(network, name))
        raise IndexError(f"tap is beyond the last of the {len(self.blocks(network))} blocks")


class _Stopped(Exception):
    """Leaves a pass with what the last block handed on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Heard(nn.Module):
    """Stands around a tapped block that others follow. A hook on it would be a part of its compiled code."""

    hidden: Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *given: Any, **named: Any) -> Any:
        found = self.block(*given, **named)
        self.hidden = found[-1] if isinstance(found, tuple) else found  # the image comes last
        return found


class _Stop(nn.Module):
    """Stands behind the last tapped block."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> None:
        raise _Stopped(hidden_states)


def family_of(kind: str) -> Family:
    """The family of a class of diffusers' transformers, by the name of the class."""
    module, name = FAMILIES[kind].family.split(":")
    return getattr(import_module(f"dmd2.networks.transformers.{module}"), name)()


def one_hot(labels: Tensor | None, width: int, like: Tensor) -> Tensor:
    """Classes ``(B,)`` as vectors ``(B, width)`` in the dtype of `like`, zeros where there are none.

    The index after the last class stands for no class.
    """
    return like.new_zeros(len(like), width) if labels is None else F.one_hot(labels, width).to(like.dtype)


def text_of(cond: Condition, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Text states ``(B, L, D)`` and their mask, bool ``(B, L)``; a class is a text of one token."""
    text = one_hot(cond.labels, width, like)[:, None] if cond.text is None else cond.text
    mask = cond.text_mask
    return text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask


def pooled_of(cond: Condition, text_width: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Text states and the pooled vector ``(B, width)``; a class is a pooled vector beside one empty token.

    The pooled vector of an encoder that makes none is the mean of its states.
    """
    if cond.text is not None:
        return cond.text, cond.text.mean(1) if cond.pooled is None else cond.pooled
    return like.new_zeros(len(like), 1, text_width), one_hot(cond.labels, width, like)
