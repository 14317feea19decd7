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
    images, finite = quantised(x, rule)
    refuse_unless(finite, "image {} of the batch")
    return images


def quantised(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The same without a look at the values, for which the host would wait: images, and which are finite ``(n,)``.

    Raises:
        UserError: an unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"there is no quantisation {rule}: choose one of {', '.join(RULES)}")
    return RULES[rule](x.float()).clamp(0, 255).to(torch.uint8), torch.isfinite(x).reshape(len(x), -1).all(dim=1)


def refuse_unless(finite: Tensor, image: str, first: int = 0) -> None:
    """Refuse images that are not all `finite` ``(n,)``; `image` is how the sentence calls one by its number.

    Raises:
        UserError: the first that is not; the first of all has the number `first`.
    """
    if not finite.all():
        bad = first + int((~finite).nonzero()[0])
        raise UserError(f"{image.format(bad)} has NaN or infinite pixels: the generator diverged")
