"""A number with its standard error and small-sample bias, and what every metric needs to make one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from scipy.special import stdtrit

from dmd2.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # tables and reports have numbers only, and need not pay for its import

Features: TypeAlias = "Tensor | np.ndarray"


@dataclass(frozen=True)
class Estimate:
    """A metric of `n` images or prompts.

    Args:
        value: the metric of this sample.
        se: standard error from the finite sample alone (another training run is not in it); None where it is unknown.
        n: number of images or prompts.
        bias: what the value exceeds its infinite-sample limit by; None where it is unknown or zero.
        influence: effect of every image on the value to first order ``(n,)``, up to a constant. Without it a paired
            difference has no error.
        of_reference: the same of the images of the reference ``(m,)``, where they are a finite draw, too.
        strata: class of every image, see `standard_error`.
        values: one value per image ``(n,)``, where the metric is their mean.
    """

    value: float
    se: float | None
    n: int
    bias: float | None = None
    influence: np.ndarray | None = field(default=None, compare=False, repr=False)
    of_reference: np.ndarray | None = field(default=None, compare=False, repr=False)
    strata: Features | None = field(default=None, compare=False, repr=False)
    values: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the infinite-sample value, around ``value - bias``; None without a standard error."""
        if self.se is None:
            return None
        centre, half = self.value - (self.bias or 0.0), t_quantile(self.n) * self.se
        return centre - half, centre + half

    def as_json(self) -> dict[str, float | int | None]:
        """Plain numbers: value, se, low, high, bias, n."""
        low, high = self.interval or (None, None)
        return {"value": self.value, "se": self.se, "low": low, "high": high, "bias": self.bias, "n": self.n}

    def minus(self, other: Estimate) -> Estimate:
        """The difference to another set, whose images at one index share seed and label or prompt.

        Raises:
            UserError: the sets have different numbers of images.
        """
        difference = self.value - other.value
        if self.influence is None or other.influence is None:
            return Estimate(difference, None, self.n)
        if self.n != other.n:
            what = "images" if self.values is None else "values"
            raise UserError(f"paired arms need the same seeds, got {other.n} and {self.n} {what}")
        if self.values is not None and other.values is not None:
            return mean(self.values - other.values, self.strata)
        if self.se is None or other.se is None:
            return Estimate(difference, None, self.n)
        bias = None if self.bias is None or other.bias is None else self.bias - other.bias
        ours, theirs = self.of_reference, other.of_reference
        of_reference = None if ours is None or theirs is None else ours - theirs
        return linear(difference, self.influence - other.influence, bias, of_reference, self.strata)


def linear(
    value: float,
    influence: np.ndarray,
    bias: float | None = None,
    of_reference: np.ndarray | None = None,
    strata: Features | None = None,
) -> Estimate:
    """A metric whose standard error follows from the influences of its images; see `Estimate` for the arguments."""
    se = standard_error(influence, strata)
    if of_reference is not None:
        theirs = standard_error(of_reference)
        se = None if se is None or theirs is None else float(np.hypot(se, theirs))
    return Estimate(value, se, len(influence), bias, influence, of_reference, strata)


def mean(values: Features, strata: Features | None = None) -> Estimate:
    """The mean of one value per image or prompt ``(n,)`` with ``sd / sqrt(n)``; `strata` as in `standard_error`.

    Raises:
        UserError: no values, not a vector, or NaN.
    """
    x = np.asarray(values if isinstance(values, np.ndarray) else values.detach().double().cpu(), np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise UserError(f"a mean needs one finite value per image, got shape {x.shape}")
    se, centred = standard_error(x, strata), x - x.mean()
    return Estimate(float(x.mean()), se, len(x), influence=centred, strata=strata, values=x)


def t_quantile(n: int, level: float = 0.95) -> float:
    """Standard errors from the mean of `n` values to either end of its two-sided interval at that level."""
    return float(stdtrit(n - 1, (1 + level) / 2))


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of two or more values and the ends of its t-interval."""
    centre = float(np.mean(values))
    half = t_quantile(len(values), level) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return centre, centre - half, centre + half


def matrix(features: Features, what: str = "features") -> Tensor:
    """Features as a float32 or float64 tensor ``(n, d)`` on the device they came from; half precision is widened.

    Raises:
        UserError: not a non-empty matrix, or NaN or infinite somewhere.
    """
    import torch

    # torch warns on read-only arrays (memory-mapped shards); those are copied
    x = torch.from_numpy(np.require(features, requirements="W")) if isinstance(features, np.ndarray) else features
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"{what} must be a table of n rows and d columns, got shape {tuple(x.shape)}")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float() if x.is_floating_point() else x.double()
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
        raise UserError(f"{what} hold NaN or infinity, first in row {row}")
    return x


def matrices(a: Features, b: Features) -> tuple[Tensor, Tensor]:
    """Two feature tables of one detector, checked, on the device of the first, in the wider of their float types."""
    import torch

    x, y = matrix(a), matrix(b)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: other detectors?")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(device=x.device, dtype=dtype)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def standard_error(influence: np.ndarray, strata: Features | None = None) -> float | None:
    """``sd / sqrt(n)`` of per-sample influences ``(n,)``; with class-balanced sampling only the spread inside classes.

    Stratified variance ``sum_c (n_c / n)^2 var_c / n_c``. Classes with one sample have no spread of their own and are
    collapsed into one stratum (Cochran, Sampling Techniques, 5A.12), which errs on the safe side.

    Args:
        influence: one value per image; their mean is the metric up to a constant.
        strata: class of every image ``(n,)``, fixed by design rather than drawn; None for independent draws.

    Returns:
        The standard error, or None with fewer than two samples.
    """
    n = len(influence)
    if n < 2:
        return None
    variance = sum(len(part) * part.var(ddof=1) for part in _split(influence, strata))
    return float(np.sqrt(variance) / n)


def _split(influence: np.ndarray, strata: Features | None) -> list[np.ndarray]:
    if strata is None:
        return [influence]
    labels = np.asarray(strata)
    if labels.shape != influence.shape:
        raise UserError(f"{len(influence)} images need one class each, got classes of shape {labels.shape}")
    _, where, counts = np.unique(labels, return_inverse=True, return_counts=True)
    lonely = counts == 1
    if lonely.sum() == 1:  # a single lonely sample joins the largest class
        lonely[counts.argmax()] = True
    codes = np.where(lonely[where], -1, where)
    return [influence[codes == code] for code in np.unique(codes)]
