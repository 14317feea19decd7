"""One row on two sides: the difference of a metric with its interval, what it shows, and what else changed.

Two or more training seeds in common: paired t-interval over them. Fewer in common: Welch's interval over all seeds, or,
if one side has a single seed, Student's with the other side's spread. One seed on both sides: the finite sample of
images only, paired through the influences of both evaluations, whose images share their noise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isclose, isfinite, sqrt
from typing import Any, Literal

import numpy as np

from dmd2.core.errors import UserError
from dmd2.core.retraining import differences as code_differences
from dmd2.core.retraining import named
from dmd2.experiment.config import NOT_IDENTITY
from dmd2.experiment.dotted_keys import differences
from dmd2.experiment.metrics import OF_PIXELS, WITH_INFLUENCES
from eval.compare.versions import Evaluation, Side, inputs
from eval.metrics.estimate import Estimate, mean_interval, t_quantile
from eval.report.differences import NORMAL, around, bounded, difference, with_influences

ROUNDING = 1e-6  # relative; below, two evaluations of the same weights differ by the order of sums
# Keys of a protocol that say how features are made and compared.
OF_FEATURES = {"protocol", "detector", "reference", "geometry", "covariance_init", "patch", "clip"}
EQUAL = "equal"  # what the interval of numbers that differ by rounding only "covers"
Verdict = Literal["better", "worse", "no difference shown", "not comparable"]
Evaluations = Mapping[int, Evaluation]  # by training seed


@dataclass(frozen=True)
class MatchedRow:
    """One row that both sides have; `classes` of its base if image i is of class ``i mod classes``, else None."""

    sides: tuple[Side, Side]
    a: Evaluations
    b: Evaluations
    classes: int | None

    @property
    def shared(self) -> list[int]:
        """Training seeds that both sides have."""
        return sorted(self.a.keys() & self.b.keys())

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

    def contrast(self, metric: str) -> dict[str, Any]:
        """A metric of both sides by training seed, ``a`` and ``b``, and their ``difference`` (B - A).

        That is None where the finite sample has no standard error.

        Raises:
            UserError: the two cannot be compared, or the influences of an evaluation are damaged.
        """
        if refusal := self._mixed or self._other_protocols(metric):
            raise UserError(refusal)
        values = []
        for name, side in (("A", self.a), ("B", self.b)):
            seeds = self.shared if len(self.shared) > 1 else sorted(side)
            if missing := [s for s in seeds if side[s].values.get(metric) is None]:
                raise UserError(f"{name} has no {metric} for seed {_numbers(missing)}")
            values.append({s: float(side[s].values[metric]) for s in seeds})
            for seed, value in values[-1].items():
                if not isfinite(value):
                    raise UserError(f"{metric} of {name}, seed {seed}, is {value}")
        a, b = values
        if a.keys() == b.keys() and all(isclose(a[s], b[s], rel_tol=ROUNDING) for s in a):
            return {"a": a, "b": b, "difference": around(0.0, 0.0, EQUAL)}
        return {"a": a, "b": b, "difference": self._interval(metric, a, b)}

    def _interval(self, metric: str, a: dict[int, float], b: dict[int, float]) -> dict[str, Any] | None:
        x, y = np.array([*a.values()]), np.array([*b.values()])
        mean = float(y.mean() - x.mean())
        if len(self.shared) > 1:
            gaps = self._gaps(metric, a, b)
            return difference(gaps) if gaps else bounded(*mean_interval(y - x), "training seeds")
        if len(x) == len(y) == 1:  # of seeds that need not be the same: images at one index share their noise anyway
            errors = [side[s].errors.get(metric) for side, of in ((self.a, a), (self.b, b)) for s in of]
            if None in errors:
                return None
            gaps = self._gaps(metric, a, b)
            half = NORMAL * float(np.hypot(*np.array(errors, np.float64)))
            return difference(gaps) if gaps else around(mean, half, "finite sample, unpaired")
        if min(len(x), len(y)) > 1:
            from scipy.stats import ttest_ind  # half a second that most comparisons need not pay

            # Welch's degrees of freedom are 0 / 0 where neither side has any spread.
            spread = x.std() > 0 or y.std() > 0
            low, high = ttest_ind(y, x, equal_var=False).confidence_interval(0.95) if spread else (mean, mean)
            return around(mean, float(high - low) / 2, "training seeds, unpaired")
        many = max(x, y, key=len)
        half = t_quantile(len(many)) * float(many.std(ddof=1)) * sqrt(1 + 1 / len(many))
        return around(mean, half, "training seeds, unpaired, one spread assumed")

    def _gaps(self, metric: str, a: dict[int, float], b: dict[int, float]) -> list[Estimate]:
        """``B - A`` of each pair of seeds with the influences; empty where a side lacks those, or has other images."""
        found = []
        for first, second in zip(a, b, strict=True):
            ours = self._with_influences(metric, self.sides[0], self.a[first], a[first])
            theirs = self._with_influences(metric, self.sides[1], self.b[second], b[second])
            if ours is None or theirs is None or ours.n != theirs.n:
                return []
            found.append(theirs.minus(ours))
        return found

    def _with_influences(self, metric: str, side: Side, known: Evaluation, value: float) -> Estimate | None:
        if metric not in WITH_INFLUENCES or not known.metrics.get("files"):
            return None
        path = side.path(f"{known.folder}/{known.metrics['files'][0]['path']}")
        if path is None:
            return None
        return with_influences(known.metrics, path.parent, known.step, metric, value, self.classes)

    @cached_property
    def _mixed(self) -> str:
        """How the seeds of one side differ; empty if they do not."""
        for name, seeds in (("A", self.a), ("B", self.b)):
            first, *others = seeds.values()
            mixed = {key for s in others for key, *_ in differences(first.protocol, s.protocol)}
            configs = {key for s in others for key, *_ in differences(first.config, s.config)}
            mixed |= {key for key in configs if _in_key(key) or key == "train.steps"}
            if mixed:
                return f"the seeds of {name} differ among themselves in {', '.join(sorted(mixed))}"
        return ""

    @cached_property
    def _protocols(self) -> tuple[list[tuple[str, Any, Any]], list[str]]:
        """Keys of the protocols that differ, with both values, and those that only one side tells.

        A published table does not tell all of them; an evaluation does, and what it lacks its version could not do.
        """
        ours, theirs = (next(iter(seeds.values())) for seeds in (self.a, self.b))
        found = [each for each in differences(ours.protocol, theirs.protocol) if each[0] != "snapshot"]
        if ours.config and theirs.config:
            return found, []
        silent = [key for key, old, new in found if old is None or new is None]
        return [each for each in found if each[0] not in silent], silent

    def _other_protocols(self, metric: str) -> str:
        """Why no number of a metric can be subtracted; empty if they can."""
        told = []
        for key, *values in self._protocols[0]:
            if metric in OF_PIXELS and key in OF_FEATURES:
                continue
            old, new = ("absent" if value is None else str(value) for value in values)
            told.append(f"{key} is {old} in A, {new} in B")
            name = old.partition("@")[0]
            if key == "detector" and new.startswith(f"{name}@"):
                told[-1] += f" (two trainings, two kinds of features: comparable with one data/weights/{name} for both)"
        return f"measured by different protocols: {'; '.join(told)}" if told else ""

    def changes(self) -> dict[str, Any]:
        """Config keys with old and new value, and sentences about data, teacher, commits and devices."""
        ours, theirs = (side[self.shared[0] if self.shared else min(side)] for side in (self.a, self.b))
        before, after = (inputs(side, each.config) for side, each in zip(self.sides, (ours, theirs), strict=True))
        texts = [
            f"{what} has other content: {content} → {after[what]}"
            for what, content in before.items()
            if after.get(what, content) != content
        ]
        unknown = [name for name, each in (("A", ours), ("B", theirs)) if not each.config]
        changed = [] if unknown else differences(ours.config, theirs.config)
        # Samplers of the teacher are no part of what a student is measured with, and older metrics list them.
        config = {key: (old, new) for key, old, new in changed if not key.startswith("eval.teacher_samplers")}
        if unknown:
            texts.append(f"the config of {' and of '.join(unknown)} is not known: only a published table is left")
        if silent := self._protocols[1]:
            texts.append(f"one side does not tell {', '.join(silent)} of its protocol: taken to be as on the other")
        keys = [(s, self.a[s].key, self.b[s].key) for s in self.shared]
        other_keys = [s for s, x, y in keys if x and y and x != y]
        if other_keys and not texts and not any(map(_in_key, config)):
            which = _numbers(other_keys)
            texts.append(f"data, teacher or pairs had other content in training (seeds {which}): the keys differ")
        if ours.step != theirs.step:
            texts.append(f"last snapshot: step {ours.step} → {theirs.step}")
        for fact in dict.fromkeys(fact for side in (self.a, self.b) for s in side.values() for fact in s.about):
            old, new = ({s.about.get(fact, "unknown") for s in side.values()} for side in (self.a, self.b))
            if old != new:
                texts.append(f"{fact}: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
        return {"config": config, "other": texts + self._code()}

    def _code(self) -> list[str]:
        """What of the method's code is not the same on both sides, where both know by which they were trained."""
        a, b = ([p for s in side.values() for p in s.metrics.get("train_code", [])] for side in (self.a, self.b))
        alike = {frozenset(part["modules"].values()) for part in a} == {frozenset(p["modules"].values()) for p in b}
        files = code_differences([*a, *b]) if a and b and not alike else []
        return [f"trained by other code: {named(files)} differ"] if files else []


def verdict_on(found: Mapping[str, Any] | None, better: str | None, margin: float) -> Verdict:
    """What an interval of ``B - A`` shows: worse or better only if all of it lies beyond `margin` on that side."""
    if found is None or better is None:
        return "not comparable"
    low, high = (found["low"], found["high"]) if better == "lower" else (-found["high"], -found["low"])
    return "worse" if low > margin else "better" if high < -margin else "no difference shown"


def _in_key(key: str) -> bool:
    """Whether a config key is part of what a training's key is made of."""
    section, _, name = key.partition(".")
    free = NOT_IDENTITY.get(section, set())
    return not (free is True or name in free)


def _numbers(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
