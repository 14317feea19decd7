"""Generated images as bytes: the rules published code uses, which differ by half a grey level."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.core.errors import UserError

# In the order of the publications: in float32, 127.5 * x + 127.5 gives other bytes than 127.5 * (x + 1).
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "trunc": lambda x: 127.5 * (x + 1),  # DMD2, GigaGAN
    "round": lambda x: 127.5 * x + 128,  # EDM, EDM2, StyleGAN-T, FastGen
    "trunc01": lambda x: 255 * (x / 2 + 0.5).clamp(0, 1),  # DMD2's teacher arms: a pipeline that returns [0, 1]
}


def quantise(x: Tensor, rule: str) -> Tensor:
    """Float images ``(n, ...)`` in [-1, 1] to uint8: the float32 value of one of `RULES`, floored, clipped to 0..255.

    Raises:
        UserError: an unknown rule, or values that are not finite.
    """
    if rule not in RULES:
        raise UserError(f"there is no quantisation {rule}: choose one of {', '.join(RULES)}")
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=1).nonzero()[0].item()
        raise UserError(f"image {bad} of the batch has NaN or infinite pixels: the generator diverged")
    return RULES[rule](x.float()).clamp(0, 255).to(torch.uint8)
