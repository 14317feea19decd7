"""The rules, fixed beforehand, by which measured values support or refute a claim.

Default rule: at least three seeds; *supported* if every seed agrees with the claim and the mean gap exceeds twice
the pooled standard deviation over seeds, *refuted* if the reverse holds under the same test, else *undecided*. Against
what has one value (the teacher, a published number) it is twice the standard deviation of the arm that has seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Literal

import numpy as np

from dmd2.experiment.table_config import MIN_SEEDS, RuleName
from dmd2.publish.table_text import TOO_FEW, mean_sd, number
from eval.metrics.estimate import mean_interval

Verdict = Literal["supported", "refuted", "undecided"]
MARGIN = 0.05  # of equivalence, as a share of the value compared with, where a claim gives none
TEACHER = "teacher"  # the teacher's sampler at the guidance that the student is distilled with, if the table has one
SINGLE = (TEACHER, "published ")  # how the names begin of what has one value, no training seeds


@dataclass(frozen=True)
class Finding:
    """A verdict with the numbers and the rule it rests on."""

    verdict: Verdict
    evidence: str
    rule: str


Curve = list[tuple[float, float]]  # (seconds of training, value)


@dataclass(frozen=True)
class Measurements:
    """Values per run and metric, by seed, and how they came about over training, as the claims ask for them."""

    values: dict[tuple[str, str], dict[int, float]]
    curves: dict[tuple[str, str], dict[int, Curve]] = field(default_factory=dict)

    def pair(self, metric: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
        """Values of two runs at their common seeds; what has one value (a teacher, a published number) is repeated.

        Raises:
            KeyError: a run or metric was not measured.
        """
        left, right = self.values[a, metric], self.values[b, metric]
        if b.startswith(SINGLE):
            right = dict.fromkeys(left, next(iter(right.values())))
        elif a.startswith(SINGLE):
            left = dict.fromkeys(right, next(iter(left.values())))
        seeds = sorted(left.keys() & right.keys())
        return np.array([left[s] for s in seeds]), np.array([right[s] for s in seeds])

    def at_equal_time(self, metric: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
        """Values of two runs when the quicker of them ended, linear between snapshots, at their common seeds.

        Raises:
            KeyError: a run or metric was not measured over a training, or not as early as that.
        """
        left, right = self.curves[a, metric], self.curves[b, metric]
        values = []
        for seed in sorted(left.keys() & right.keys()):
            curves = left[seed], right[seed]
            end = min(curve[-1][0] for curve in curves)
            for run, curve in zip((a, b), curves, strict=True):
                if (first := curve[0][0]) > end:
                    raise KeyError((run, f"{metric} at {end:.0f} s, before the first snapshot ({first:.0f} s),"))
            values.append([np.interp(end, *np.array(curve).T) for curve in curves])
        x, y = np.array(values).reshape(-1, 2).T
        return x, y


def below(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is lower than b" under the default rule."""
    return _compared(*m.pair(metric, a, b), metric, a, b)


def above(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is higher than b" under the default rule."""
    return below(m, metric, b, a)


def faster(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is lower than b at equal time" under the default rule; lower must be better."""
    return _compared(*m.at_equal_time(metric, a, b), f"{metric} at equal training time", a, b)


def _compared(x: np.ndarray, y: np.ndarray, metric: str, a: str, b: str) -> Finding:
    spread = {name: values for name, values in ((a, x), (b, y)) if not name.startswith(SINGLE)}
    sd, noise, one = "pooled SD", "pooled seed SD", ""
    if len(spread) == 1:
        seeded, constant = (a, b) if a in spread else (b, a)
        sd, noise, one = f"SD of {seeded}", f"seed SD of {seeded}", f" ({constant} has one value)"
    rule = f"{metric} of {a} below {b} in each of {MIN_SEEDS} or more seeds, mean gap above twice the {noise}{one}"
    gaps = y - x
    evidence = f"{_both(x, y, a, b)}; {a} lower in {int((gaps > 0).sum())} of {len(gaps)} seeds"
    if len(gaps) < MIN_SEEDS:
        return Finding("undecided", evidence + TOO_FEW.format(len(gaps), MIN_SEEDS), rule)
    deviation = sqrt(np.mean([values.var(ddof=1) for values in spread.values()]))
    evidence += f"; mean gap {number(gaps.mean())}, {sd} {number(deviation, 2)}"
    agree, clear = (gaps > 0).all() or (gaps < 0).all(), abs(gaps.mean()) > 2 * deviation
    verdict: Verdict = "undecided" if not (agree and clear) else "supported" if gaps[0] > 0 else "refuted"
    return Finding(verdict, evidence, rule)


def equivalent(m: Measurements, metric: str, a: str, b: str, share: float = MARGIN) -> Finding:
    """The claim "a equals b": the paired 90 % t-interval is inside ± a share of b (two one-sided tests at 5 %)."""
    inside = f"inside ±{100 * share:.3g}% of {b}, at least {MIN_SEEDS} seeds"
    rule = f"90 % paired t-interval of the {metric} difference {inside}"
    evidence, (low, high), margin = _interval(m, metric, a, b, share)
    equal, other = -margin < low and high < margin, low > margin or high < -margin
    return Finding("supported" if equal else "refuted" if other else "undecided", evidence, rule)


def no_gain(m: Measurements, metric: str, a: str, b: str, share: float = MARGIN) -> Finding:
    """The claim "a is no better than b": not lower by more than a share of b (a one-sided test at 5 %)."""
    rule = (
        f"90 % paired t-interval of the {metric} difference {a} minus {b} above -{100 * share:.3g}% of {b}, at least "
        f"{MIN_SEEDS} seeds; refuted if all of it is below that"
    )
    evidence, (low, high), margin = _interval(m, metric, a, b, share)
    return Finding("supported" if low > -margin else "refuted" if high < -margin else "undecided", evidence, rule)


def _interval(m: Measurements, metric: str, a: str, b: str, share: float) -> tuple[str, tuple[float, float], float]:
    """Evidence, the paired 90 % t-interval of ``a - b`` (boundless with too few seeds), and the margin on its scale."""
    x, y = m.pair(metric, a, b)
    margin, gaps = share * float(y.mean()), x - y
    evidence = f"{_both(x, y, a, b)}; mean difference {number(gaps.mean(), 3, '+')}, margin {number(margin, 2)}"
    if len(gaps) < MIN_SEEDS:
        return evidence + TOO_FEW.format(len(gaps), MIN_SEEDS), (-inf, inf), margin
    _, low, high = mean_interval(gaps, 0.9)
    return f"{evidence}, interval {number(low, 3, '+')} to {number(high, 3, '+')}", (low, high), margin


def every(*parts: Finding) -> Finding:
    """A claim of several parts: supported if all are, refuted if one is."""
    verdicts = {part.verdict for part in parts}
    verdict: Verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    numbered = [(f"({i})", part) for i, part in enumerate(parts, start=1)]
    evidence = ". ".join(f"{number} {part.verdict}: {part.evidence}" for number, part in numbered)
    return Finding(verdict, evidence, ". ".join(f"{number} {part.rule}" for number, part in numbered))


def _both(x: np.ndarray, y: np.ndarray, a: str, b: str) -> str:
    """Both runs with their values; a repeated single one is shown once."""
    runs = ((a, x), (b, y))
    return ", ".join(f"{name} {mean_sd(values[:1] if name.startswith(SINGLE) else values)}" for name, values in runs)


# As claims name them; those with a `margin` take it as `share`.
RULES: dict[RuleName, Callable[..., Finding]] = {
    "below": below, "above": above, "faster": faster, "equivalent": equivalent, "no_gain": no_gain
}  # fmt: skip
