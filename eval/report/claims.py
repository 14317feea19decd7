"""Verdicts on the paper's claims, which ``claims.yaml`` lists, and on a table's own, by `eval.report.rules`."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from dmd2.experiment.metrics import FRECHET
from dmd2.experiment.table_config import Claim, Table
from eval.report.rules import RULES, Finding, Measurements, Verdict, equivalent, every, no_gain

# C5: ratio 1 is as steady as ratio 5 unless ratio 5's SD of brightness is lower by more than this share. The paper's
# differ by a factor of 9, and a run's varies by 10 to 25 % between seeds, so three seeds could not show 5 %.
AS_STEADY = 0.5


CLAIMS = {
    values["id"]: Claim.model_validate(values)
    for values in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
}


def claims_of(table: Table) -> list[Claim]:
    """The claims that a table names and those that it states itself, in order."""
    return [CLAIMS[claim] if isinstance(claim, str) else claim for claim in table.claims]


def is_timed(claim: Claim) -> bool:
    """Whether rows are compared at equal time."""
    return any(test.rule == "faster" for test in claim.tests)


def find(claim: Claim, m: Measurements, metric: str) -> Finding:
    """Test a claim where `metric` is the distance that it is about.

    Raises:
        KeyError: a run or metric was not measured.
    """
    metrics = {"distance": metric, "patch": f"patch_{metric}"}
    parts = [
        RULES[test.rule](m, metrics.get(test.metric, test.metric), test.a, test.b, *filter(None, [test.margin]))
        for test in claim.tests
    ]
    if claim is CLAIMS["C5"]:
        return _trade(m, *parts)
    if claim is CLAIMS["C10"]:
        return _no_rescue(m, metric, *parts)
    return parts[0] if len(parts) == 1 else every(*parts)


def _trade(m: Measurements, faster: Finding, steadier: Finding) -> Finding:
    """C5: another optimum than ratio 5 does not refute it, a ratio 1 that is as steady as ratio 5 does."""
    both = every(faster, steadier)
    as_steady = no_gain(m, "brightness_std", "ttur", "no-regression", AS_STEADY)
    refuted = steadier.verdict == "refuted" or (steadier.verdict == "undecided" and as_steady.verdict == "supported")
    verdict: Verdict = "supported" if both.verdict == "supported" else "refuted" if refuted else "undecided"
    equal = as_steady.rule.partition(";")[0]
    rule = (
        f"supported by both: {both.rule}. Refuted only if no-regression is as steady as ttur ((2) is not supported and "
        f"{equal}) or steadier, whichever of ttur and ttur-10 is ahead"
    )
    return Finding(verdict, f"{both.evidence}. As steady: {as_steady.evidence}", rule)


def _no_rescue(m: Measurements, metric: str, apart: Finding) -> Finding:
    """C10: refuted only if TTUR brings GAN-only to the level of DMD2."""
    close = equivalent(m, metric, "gan-only-ttur", "dmd2")
    rescued = apart.verdict == "refuted" or close.verdict == "supported"
    rule = f"supported if {apart.rule}; refuted if gan-only-ttur is lower, or equal: {close.rule}"
    return Finding("refuted" if rescued else apart.verdict, apart.evidence, rule)


def distance(metrics: Sequence[str]) -> str:
    """The metric that claims about quality judge: the first Frechet distance of a table's metrics."""
    return next((metric for metric in metrics if metric in FRECHET), FRECHET[0])


def judge(claims: Sequence[Claim], measurements: Measurements, metric: str) -> list[dict[str, str]]:
    """Verdicts of claims on the table's distance `metric`, in order; rows not measured are said so."""
    results = []
    for claim in claims:
        try:
            found = find(claim, measurements, metric)
        except KeyError as missing:
            run, value = missing.args[0]
            found = Finding("undecided", f"not measured: {value} of {run}", "")
        about = {"id": claim.id, "claim": claim.claim, "paper": claim.paper}
        results.append({**about, "verdict": found.verdict, "evidence": found.evidence, "rule": found.rule})
    return results
