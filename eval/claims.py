"""The paper's falsifiable claims and the rules, fixed beforehand, that turn our numbers into verdicts.

Default rule: at least three seeds; *supported* if the sign is the paper's in every seed and the mean gap exceeds twice
the pooled standard deviation over seeds, *refuted* if the reverse holds under the same test, else *undecided*.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["supported", "refuted", "undecided"]
MIN_SEEDS = 3
SETTLED = 0.2  # brightness stability ignores this first share of training, while the student leaves its initial state
MARGIN = 0.05  # equivalence margin of C3, C10 and C16, as a share of the distance compared with
SINGLE = ("teacher", "published ")  # what has one value, no training seeds
TEACHER = "teacher"  # the teacher's sampler at the guidance that the student is distilled with, if the table has one


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
            KeyError: a run or metric was not measured over a training.
        """
        left, right = self.curves[a, metric], self.curves[b, metric]
        pairs = [(left[s], right[s]) for s in sorted(left.keys() & right.keys())]
        ends = [min(x[-1][0], y[-1][0]) for x, y in pairs]
        both = [[_value_at(end, curve) for curve in pair] for end, pair in zip(ends, pairs, strict=True)]
        x, y = np.array(both).reshape(-1, 2).T
        return x, y


def _value_at(seconds: float, curve: Curve) -> float:
    times, values = zip(*curve, strict=True)
    return float(np.interp(seconds, times, values))


def lower(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is lower than b" under the default rule."""
    return _below(*m.pair(metric, a, b), metric, a, b)


def faster(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is lower than b at equal time" under the default rule."""
    return _below(*m.at_equal_time(metric, a, b), f"{metric} at equal training time", a, b)


def _below(x: np.ndarray, y: np.ndarray, metric: str, a: str, b: str) -> Finding:
    rule = f"{metric} of {a} below {b} in each of {MIN_SEEDS} or more seeds, mean gap above twice the pooled seed SD"
    gaps = y - x
    evidence = f"{a} {show(x)}, {b} {show(y)}; {a} lower in {int((gaps > 0).sum())} of {len(gaps)} seeds"
    if len(gaps) < MIN_SEEDS:
        return Finding("undecided", f"{evidence}; measured with {len(gaps)}, needs {MIN_SEEDS} seeds", rule)
    spread = sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    clear = abs(gaps.mean()) > 2 * spread
    evidence += f"; mean gap {gaps.mean():.3g}, pooled SD {spread:.2g}"
    if clear and (gaps > 0).all():
        return Finding("supported", evidence, rule)
    if clear and (gaps < 0).all():
        return Finding("refuted", evidence, rule)
    return Finding("undecided", evidence, rule)


def equivalent(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a equals b": the paired 90 % t-interval lies inside the margin (two one-sided tests at 5 %)."""
    rule = f"90 % paired t-interval of the {metric} difference inside ±{MARGIN:.0%} of {b}, at least {MIN_SEEDS} seeds"
    evidence, interval, margin = _interval(m, metric, a, b)
    if interval is None:
        return Finding("undecided", evidence, rule)
    low, high = interval
    if -margin < low and high < margin:
        return Finding("supported", evidence, rule)
    return Finding("refuted" if low > margin or high < -margin else "undecided", evidence, rule)


def no_gain(m: Measurements, metric: str, a: str, b: str) -> Finding:
    """The claim "a is no better than b": not lower by more than the margin (a one-sided test at 5 %)."""
    rule = (
        f"90 % paired t-interval of the {metric} difference {a} minus {b} above -{MARGIN:.0%} of {b}, at least "
        f"{MIN_SEEDS} seeds; refuted if all of it is below that"
    )
    evidence, interval, margin = _interval(m, metric, a, b)
    if interval is None:
        return Finding("undecided", evidence, rule)
    low, high = interval
    return Finding("supported" if low > -margin else "refuted" if high < -margin else "undecided", evidence, rule)


def _interval(m: Measurements, metric: str, a: str, b: str) -> tuple[str, tuple[float, float] | None, float]:
    """Evidence, the paired 90 % t-interval of ``a - b`` (None with too few seeds), and the margin on its scale."""
    x, y = m.pair(metric, a, b)
    margin, gaps = MARGIN * float(y.mean()), x - y
    evidence = f"{a} {show(x)}, {b} {show(y)}; mean difference {gaps.mean():+.3g}, margin {margin:.2g}"
    if len(gaps) < MIN_SEEDS:
        return f"{evidence}; measured with {len(gaps)}, needs {MIN_SEEDS} seeds", None, margin
    half = float(stats.t.ppf(0.95, len(gaps) - 1)) * float(gaps.std(ddof=1)) / sqrt(len(gaps))
    low, high = float(gaps.mean() - half), float(gaps.mean() + half)
    return f"{evidence}, interval {low:+.3g} to {high:+.3g}", (low, high), margin


def every(*parts: Finding) -> Finding:
    """A claim of several parts: supported if all are, refuted if one is."""
    verdicts = {part.verdict for part in parts}
    verdict: Verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    numbered = [(f"({i})", part) for i, part in enumerate(parts, start=1)]
    evidence = ". ".join(f"{number} {part.verdict}: {part.evidence}" for number, part in numbered)
    return Finding(verdict, evidence, ". ".join(f"{number} {part.rule}" for number, part in numbered))


def _steadier(m: Measurements, metric: str) -> Finding:
    """C2, and the second half of C5: a higher ratio steadies the images."""
    return lower(m, "brightness_std", "ttur", "no-regression")


def _no_rescue(m: Measurements, metric: str) -> Finding:
    """C10: refuted only if TTUR brings GAN-only to the level of DMD2."""
    apart, close = lower(m, metric, "dmd2", "gan-only-ttur"), equivalent(m, metric, "gan-only-ttur", "dmd2")
    rescued = apart.verdict == "refuted" or close.verdict == "supported"
    verdict: Verdict = "refuted" if rescued else apart.verdict
    rule = f"supported if {apart.rule}; refuted if gan-only-ttur is lower, or equal: {close.rule}"
    return Finding(verdict, apart.evidence, rule)


def show(values: np.ndarray) -> str:
    """``mean ± SD`` of a value per seed, or the one value; large numbers without exponent."""
    if len(values) < 2 or (values == values[0]).all():
        return _number(float(values[0]), 3)
    return f"{_number(values.mean(), 3)} ± {_number(values.std(ddof=1), 2)}"


def _number(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: its text, the paper's numbers, and the test on ours."""

    text: str
    paper: str
    test: Callable[[Measurements, str], Finding]


CLAIMS: dict[str, Claim] = {
    "C1": Claim(
        "Dropping the regression at ratio 1 hurts quality",
        "Table 3: 2.62 to 3.48",
        lambda m, metric: lower(m, metric, "dmd", "no-regression"),
    ),
    "C2": Claim(
        "Without regression, ratio 1 is unstable and a higher ratio cures it",
        "Figure 8: SD of brightness 0.051 at ratio 1, 0.006 at ratio 5",
        _steadier,
    ),
    "C3": Claim(
        "Ratio 5 without regression equals DMD with regression",
        "Table 3: 2.61 against 2.62",
        lambda m, metric: equivalent(m, metric, "ttur", "dmd"),
    ),
    "C4": Claim(
        "At equal time, ratio 5 without regression is ahead of DMD with regression",
        "Figure 9: 3.4 against 5.9 at 35 h",
        lambda m, metric: faster(m, metric, "ttur", "dmd"),
    ),
    "C5": Claim(
        "The ratio trades stability for speed: 5 is ahead of 10 at equal time, and steadier than 1",
        "Figure 9: 3.4 against 4.0 at 35 h; Figure 8: SD of brightness 0.006 against 0.051",
        lambda m, metric: every(faster(m, metric, "ttur", "ttur-10"), _steadier(m, metric)),
    ),
    "C6": Claim(
        "At equal time, more critic updates are ahead of a larger critic learning rate",
        "Figure 9: 3.4 against 4.1 at 35 h",
        lambda m, metric: faster(m, metric, "ttur", "async-lr"),
    ),
    "C7": Claim(
        "Adding the GAN loss gives a large gain",
        "Table 3: 2.61 to 1.51",
        lambda m, metric: lower(m, metric, "dmd2", "ttur"),
    ),
    "C8": Claim(
        "With real data the student beats its teacher's ODE sampler; without, it does not",
        "Tables 1 and 3: 1.51 and 2.61 against 2.32",
        lambda m, metric: every(lower(m, metric, "dmd2", "teacher-ode"), _worse_than_teacher(m, metric)),
    ),
    "C9": Claim(
        "The GAN loss alone is clearly worse than DMD2",
        "Table 3: 2.56 against 1.51",
        lambda m, metric: lower(m, metric, "dmd2", "gan-only"),
    ),
    "C10": Claim("TTUR does not rescue the GAN-only baseline", "Table 3: 2.56 to 2.52", _no_rescue),
    "C11": Claim(
        "A longer training in two stages, the GAN in the second only, improves further",
        "Table 1: 1.51 to 1.28, with about twice the compute",
        lambda m, metric: lower(m, metric, "dmd2-long", "dmd2"),
    ),
    "C12": Claim(
        "One-step DMD2 beats the one-step distillations before it",
        "Table 1: 1.51 against 1.92 (CTM)",
        lambda m, metric: lower(m, metric, "dmd2", "published best"),
    ),
    "C13": Claim(
        "Backward simulation improves four steps, details most",
        "Table 4: FID 20.66 to 19.32, patch FID 24.21 to 20.86",
        lambda m, metric: every(*(lower(m, d, "4step", "4step-no-backsim") for d in (metric, patch(metric)))),
    ),
    "C14": Claim(
        "Without distribution matching the distance falls, but images follow their captions less and lose detail",
        "Table 4: FID 13.77 against 19.32, but CLIP 0.307 against 0.332 and patch FID 27.96 against 20.86",
        lambda m, metric: every(
            lower(m, metric, "4step-no-dm", "4step"),
            lower(m, "clip_score", "4step-no-dm", "4step"),
            lower(m, patch(metric), "4step", "4step-no-dm"),
        ),
    ),
    "C15": Claim(
        "Without the GAN loss quality drops, and images are over-saturated and over-smooth beside the teacher's",
        "Table 4: FID 26.90 against 19.32; the appearance is described, not measured",
        lambda m, metric: every(
            lower(m, metric, "4step", "4step-no-gan"),
            lower(m, "saturation", TEACHER, "4step-no-gan"),
            lower(m, "sharpness", "4step-no-gan", TEACHER),
        ),
    ),
    "C16": Claim(
        "Four steps buy detail, not global quality",
        "Table 2: patch FID 26.98 to 20.86, FID 19.01 to 19.32",
        lambda m, metric: every(lower(m, patch(metric), "4step", "1step"), no_gain(m, metric, "4step", "1step")),
    ),
}


def patch(metric: str) -> str:
    """The distance over patches that belongs to a distance: ``patch_fid`` to ``fid``."""
    return f"patch_{metric}"


def _worse_than_teacher(m: Measurements, metric: str) -> Finding:
    reverse = lower(m, metric, "ttur", "teacher-ode")
    flipped: dict[Verdict, Verdict] = {"supported": "refuted", "refuted": "supported", "undecided": "undecided"}
    rule = reverse.rule.replace("below", "above")
    return Finding(flipped[reverse.verdict], reverse.evidence, rule)


def judge(claims: Sequence[str], measurements: Measurements, metric: str) -> list[dict[str, str]]:
    """Verdicts of the named claims on the table's distance `metric`, in order; rows not measured are said so."""
    results = []
    for name in claims:
        claim = CLAIMS[name]
        try:
            finding = claim.test(measurements, metric)
        except KeyError as missing:
            run, value = missing.args[0]
            finding = Finding("undecided", f"not measured: {value} of {run}", "")
        entry = {"id": name, "claim": claim.text, "paper": claim.paper}
        results.append({**entry, "verdict": finding.verdict, "evidence": finding.evidence, "rule": finding.rule})
    return results
