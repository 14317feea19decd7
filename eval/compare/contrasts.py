"""One row on two sides: the difference of a metric with its interval, what it shows, and what else changed.

Two or more training seeds in common: paired t-interval over them. Fewer in common: Welch's interval over all seeds, or,
if one side has a single seed, Student's with the other side's spread. One seed on both sides: the finite sample of
images only, paired through the influences of both evaluations, whose images share their noise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose, isfinite, sqrt
from typing import Any, Literal

import numpy as np
from scipy.stats import ttest_ind

from dmd2.core.retraining import differences, named
from dmd2.experiment.config import NOT_IDENTITY
from dmd2.experiment.dotted_keys import leaves
from dmd2.experiment.metrics import WITH_INFLUENCES
from eval.compare.versions import Seed, Side, inputs
from eval.metrics.estimate import mean_interval, t_quantile
from eval.report.differences import NORMAL, Arm, around, bounded, difference, influences

ROUNDING = 1e-6  # relative; below, two evaluations of the same weights differ by the order of sums
EQUAL = "equal"  # what the interval of numbers that differ by rounding only "covers"
Verdict = Literal["better", "worse", "no difference shown", "not comparable"]
Seeds = Mapping[int, Seed]


@dataclass(frozen=True)
class Contrast:
    """A metric on both sides over the training seeds that were compared, and ``B - A``.

    `found` has value, low, high and what the interval covers; without it `reason` says why there is none.
    """

    metric: str
    a: dict[int, float]
    b: dict[int, float]
    found: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """One row of both sides; `classes` of its base if image i is of class ``i mod classes``, else None."""

    sides: tuple[Side, Side]
    a: Seeds
    b: Seeds
    classes: int | None

    @property
    def shared(self) -> list[int]:
        """Training seeds that both sides have."""
        return sorted(self.a.keys() & self.b.keys())

    @property
    def compared(self) -> tuple[list[int], list[int]]:
        """Training seeds of A and of B that a difference is taken over."""
        return (self.shared, self.shared) if len(self.shared) > 1 else (sorted(self.a), sorted(self.b))

    def seeds(self) -> str:
        """The seeds of both sides and what that means for the interval, as a sentence."""
        a, b = _numbers(self.a), _numbers(self.b)
        if len(self.shared) > 1:
            same = self.a.keys() == self.b.keys()
            return f"seeds {a}: paired" if same else f"A has seeds {a}; B {b}: paired over {_numbers(self.shared)}"
        if len(self.a) == len(self.b) == 1:
            which = f"seed {a}" if self.shared else f"A has seed {a}; B {b}"
            return f"{which}: the interval covers the finite sample of images, not another training"
        overlap = f" ({_numbers(self.shared)} on both sides)" if self.shared else ""
        if len(self.a) > 1 and len(self.b) > 1:
            return f"A has seeds {a}; B {b}{overlap}: unpaired, Welch interval"
        few, many = ("A", "B") if len(self.a) == 1 else ("B", "A")
        return f"A has seeds {a}; B {b}{overlap}: unpaired, the spread of {few} over seeds taken to be that of {many}"

    def contrast(self, metric: str) -> Contrast:
        """``B - A`` of a metric.

        Raises:
            UserError: the influences of an evaluation are damaged.
        """
        ours, theirs = self.compared
        a, b = ({s: side[s].values.get(metric) for s in seeds} for side, seeds in ((self.a, ours), (self.b, theirs)))
        for name, values in (("A", a), ("B", b)):
            if missing := [s for s, value in values.items() if value is None]:
                return Contrast(metric, {}, {}, None, f"{name} has no {metric} for seed {_numbers(missing)}")
            if wild := {s: v for s, v in values.items() if v is not None and not isfinite(v)}:
                seed, value = next(iter(wild.items()))
                return Contrast(metric, {}, {}, None, f"{metric} of {name}, seed {seed}, is {value}")
        x, y = ({s: float(v) for s, v in values.items() if v is not None} for values in (a, b))
        if x.keys() == y.keys() and all(isclose(x[s], y[s], rel_tol=ROUNDING) for s in x):
            return Contrast(metric, x, y, around(0.0, 0.0, EQUAL))
        interval = self._interval(metric, x, y)
        return Contrast(metric, x, y, interval, "" if interval else "the finite sample has no standard error")

    def _interval(self, metric: str, a: dict[int, float], b: dict[int, float]) -> dict[str, Any] | None:
        if len(self.shared) > 1:
            return self._paired(metric, a, b)
        if len(a) == len(b) == 1:
            return self._single(metric, a, b)
        x, y = np.array([*a.values()]), np.array([*b.values()])
        mean = float(y.mean() - x.mean())
        if min(len(x), len(y)) > 1:
            # Welch's degrees of freedom are 0 / 0 where neither side has any spread.
            spread = x.std() > 0 or y.std() > 0
            low, high = ttest_ind(y, x, equal_var=False).confidence_interval(0.95) if spread else (mean, mean)
            return around(mean, float(high - low) / 2, "training seeds, unpaired")
        many = max(x, y, key=len)
        half = t_quantile(len(many)) * float(many.std(ddof=1)) * sqrt(1 + 1 / len(many))
        return around(mean, half, "training seeds, unpaired, one spread assumed")

    def _paired(self, metric: str, a: dict[int, float], b: dict[int, float]) -> dict[str, Any]:
        known = [{s: self._influence(metric, side, s) for s in a} for side in (0, 1)]
        psi = [{s: values for s, values in side.items() if values is not None} for side in known]
        if psi[0].keys() == psi[1].keys() == a.keys():
            return difference(Arm(b, psi[1]), Arm(a, psi[0]), self.classes)
        return bounded(*mean_interval([b[s] - a[s] for s in a]), "training seeds")

    def _single(self, metric: str, a: dict[int, float], b: dict[int, float]) -> dict[str, Any] | None:
        """One seed each, which need not be the same: images at one index share their noise all the same."""
        (first, x), (second, y) = next(iter(a.items())), next(iter(b.items()))
        errors = self.a[first].errors.get(metric), self.b[second].errors.get(metric)
        if errors[0] is None or errors[1] is None:
            return None
        psi, other = self._influence(metric, 0, first), self._influence(metric, 1, second)
        if psi is not None and other is not None and len(psi) == len(other):
            return difference(Arm({0: y}, {0: other}), Arm({0: x}, {0: psi}), self.classes)
        half = NORMAL * float(np.hypot(errors[0], errors[1]))
        return around(y - x, half, "finite sample, unpaired")

    def _influence(self, metric: str, i: int, seed: int) -> np.ndarray | None:
        """Influences of one evaluation on a metric; None where this side does not have them."""
        side, record = self.sides[i], (self.a, self.b)[i][seed]
        if metric not in WITH_INFLUENCES or not record.metrics or not record.metrics.get("files"):
            return None
        path = side.path(f"{record.folder}/{record.metrics['files'][0]['path']}")
        return None if path is None else influences(record.metrics, path.parent, record.step, metric)

    def refusal(self) -> str:
        """Why no number of this row can be subtracted; empty if they can."""
        for name, seeds in (("A", self.a), ("B", self.b)):
            first = next(iter(seeds.values()))
            mixed = {key for s in seeds.values() for key in changed(first.protocol, s.protocol)}
            configs = {key for s in seeds.values() for key in changed(first.config, s.config)}
            mixed |= {key for key in configs if _in_key(key) or key == "train.steps"}
            if mixed:
                return f"the seeds of {name} differ among themselves in {', '.join(sorted(mixed))}"
        ours, theirs = (next(iter(seeds.values())).protocol for seeds in (self.a, self.b))
        differing = changed(ours, theirs)
        told = "; ".join(f"{key} is {old} in A, {new} in B" for key, (old, new) in differing.items())
        return f"measured by different protocols: {told}" if differing else ""

    def changes(self) -> dict[str, Any]:
        """Config keys with old and new value, and sentences about data, teacher, commits and devices."""
        ours, theirs = self._beside()
        texts = []
        contents = [inputs(side, record.config) for side, record in zip(self.sides, (ours, theirs), strict=True)]
        for what in contents[0].keys() & contents[1].keys():
            if contents[0][what] != contents[1][what]:
                texts.append(f"{what} has other content: {contents[0][what]} → {contents[1][what]}")
        keys = [(s, self.a[s].key, self.b[s].key) for s in self.shared]
        unknown = [name for name, record in (("A", ours), ("B", theirs)) if not record.config]
        config = {} if unknown else changed(ours.config, theirs.config)
        if unknown:
            texts.append(f"the config of {' and of '.join(unknown)} is not known: only a published table is left")
        if not texts and not any(map(_in_key, config)) and any(x and y and x != y for _, x, y in keys):
            which = _numbers(s for s, x, y in keys if x != y)
            texts.append(f"data, teacher or pairs had other content in training (seeds {which}): the keys differ")
        if ours.step != theirs.step:
            texts.append(f"last snapshot: step {ours.step} → {theirs.step}")
        facts = dict.fromkeys(fact for seeds in (self.a, self.b) for s in seeds.values() for fact in s.about)
        for fact in facts:
            old, new = ({s.about.get(fact, "unknown") for s in seeds.values()} for seeds in (self.a, self.b))
            if old != new:
                texts.append(f"{fact}: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
        return {"config": config, "other": texts + self._code()}

    def _code(self) -> list[str]:
        """What of the method's code is not the same on both sides, where both know by which they were trained."""
        known = [[(s.metrics or {}).get("train_code", []) for s in side.values()] for side in (self.a, self.b)]
        a, b = ([part for parts in side for part in parts] for side in known)
        alike = {frozenset(part["modules"].values()) for part in a} == {frozenset(p["modules"].values()) for p in b}
        files = differences([*a, *b]) if a and b and not alike else []
        return [f"trained by other code: {named(files)} differ"] if files else []

    def _beside(self) -> tuple[Seed, Seed]:
        """The records of the first shared seed, or the first of each side."""
        first = self.shared[0] if self.shared else None
        return self.a[min(self.a) if first is None else first], self.b[min(self.b) if first is None else first]


def judge(found: Mapping[str, Any] | None, better: str | None, margin: float) -> Verdict:
    """What an interval of ``B - A`` shows: worse or better only if all of it lies beyond `margin` on that side."""
    if found is None or better is None:
        return "not comparable"
    low, high = (found["low"], found["high"]) if better == "lower" else (-found["high"], -found["low"])
    return "worse" if low > margin else "better" if high < -margin else "no difference shown"


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted leaf keys whose values differ, with both; a key that one side lacks is "absent" there."""
    ours, theirs = leaves(old), leaves(new)
    both = {key: (ours.get(key, "absent"), theirs.get(key, "absent")) for key in (ours | theirs)}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def _in_key(key: str) -> bool:
    """Whether a config key is part of what a training's key is made of."""
    section, _, name = key.partition(".")
    free = NOT_IDENTITY.get(section, set())
    return not (free is True or name in free)


def _numbers(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
