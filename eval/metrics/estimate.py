"""A number with its standard error and small-sample bias, and what every metric needs to make one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from dmd2.core.errors import UserError

Features = Tensor | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A metric of `n` images.

    `se` is the standard error from the finite sample alone (another training run is not in it), None where the sample
    is too small to know it. `bias` is what the value exceeds its infinite-sample limit by, None where unknown or zero.
    """

    value: float
    se: float | None
    n: int
    bias: float | None = None

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


def t_quantile(n: int, level: float = 0.95) -> float:
    """Standard errors from the mean of `n` values to either end of its two-sided interval at that level."""
    return float(t.ppf((1 + level) / 2, n - 1))


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of two or more values and the ends of its t-interval."""
    mean = float(np.mean(values))
    half = t_quantile(len(values), level) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Linear:
    """A metric around one sample, to first order in its images: what error and paired differences follow from.

    Args:
        value: of the sample.
        influence: effect of every image on it ``(n,)``, up to a constant.
        bias: what it exceeds its infinite-sample limit by, None where unknown or zero.
        known: whether the sample is large enough for the influences to tell a standard error.
        beside: influence of the images of the reference ``(m,)``, where they are a finite draw, too.
    """

    value: float
    influence: np.ndarray
    bias: float | None = None
    known: bool = True
    beside: np.ndarray | None = None

    def estimate(self, strata: Features | None = None) -> Estimate:
        """The value with its standard error; `strata` as in `standard_error`."""
        if not self.known:
            return Estimate(self.value, None, len(self.influence))
        se = standard_error(self.influence, strata)
        if self.beside is not None:
            theirs = standard_error(self.beside)
            se = None if se is None or theirs is None else float(np.hypot(se, theirs))
        return Estimate(self.value, se, len(self.influence), self.bias)

    def minus(self, other: Linear) -> Linear:
        """The difference to another arm, whose images at one index share seed and label or prompt.

        Raises:
            UserError: the arms have different numbers of images.
        """
        a, b = other, self
        if len(a.influence) != len(b.influence):
            raise UserError(f"paired arms need the same seeds, got {len(a.influence)} and {len(b.influence)} images")
        bias = None if a.bias is None or b.bias is None else b.bias - a.bias
        beside = None if a.beside is None or b.beside is None else b.beside - a.beside
        return Linear(b.value - a.value, b.influence - a.influence, bias, a.known and b.known, beside)


@dataclass(frozen=True)
class Mean:
    """A metric that is the mean of one value per image or prompt ``(n,)``, for example of CLIP cosines."""

    values: np.ndarray

    @staticmethod
    def of(values: Features) -> Mean:
        """The mean of `values`.

        Raises:
            UserError: no values, not a vector, or NaN.
        """
        x = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
        if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
            raise UserError(f"a mean needs one finite value per image, got shape {x.shape}")
        return Mean(x)

    @property
    def influence(self) -> np.ndarray:
        """Effect of every image ``(n,)``."""
        return self.values - self.values.mean()

    def estimate(self, strata: Features | None = None) -> Estimate:
        """The mean with ``sd / sqrt(n)``; `strata` as in `standard_error`."""
        return Estimate(float(self.values.mean()), standard_error(self.values, strata), len(self.values))

    def minus(self, other: Mean) -> Mean:
        """The mean difference to another arm, whose values at one index share seed and label or prompt.

        Raises:
            UserError: the arms have different numbers of values.
        """
        if len(self.values) != len(other.values):
            raise UserError(f"paired arms need the same seeds, got {len(other.values)} and {len(self.values)} values")
        return Mean(self.values - other.values)


def matrix(features: Features, what: str = "features") -> Tensor:
    """Features as a float32 or float64 tensor ``(n, d)`` on the device they came from; half precision is widened.

    Raises:
        UserError: not a non-empty matrix, or NaN or infinite somewhere.
    """
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
    x, y = matrix(a), matrix(b)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: other detectors?")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(device=x.device, dtype=dtype)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def standard_error(influence: np.ndarray, strata: np.ndarray | Tensor | None = None) -> float | None:
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


def _split(influence: np.ndarray, strata: np.ndarray | Tensor | None) -> list[np.ndarray]:
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
