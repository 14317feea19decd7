"""The paper's falsifiable claims, each with the test that turns our numbers into a verdict by `eval.report.rules`.

Claims about quality are about the paper's FID, so they judge the first Frechet distance among a table's metrics, not
whatever metric its columns begin with: margins, the patch distance beside it and the sign (lower is better) are those
of a distance, and the paper says nothing of accuracy. Other quantities are named by the claim that needs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dmd2.experiment.metrics import FRECHET
from eval.report.rules import (
    TEACHER,
    Finding,
    Measurements,
    Verdict,
    equivalent,
    every,
    faster,
    lower,
    no_gain,
)

# C5: ratio 1 is as steady as ratio 5 unless ratio 5's SD of brightness is lower by more than this share. The paper's
# differ by a factor of 9, and a run's varies by 10 to 25 % between seeds, so three seeds could not show 5 %.
AS_STEADY = 0.5


def _steadier(m: Measurements, metric: str) -> Finding:
    """C2, and the second half of C5: a higher ratio steadies the images."""
    return lower(m, "brightness_std", "ttur", "no-regression")


def _trade(m: Measurements, metric: str) -> Finding:
    """C5: another optimum than ratio 5 does not refute it, a ratio 1 that is as steady as ratio 5 does."""
    both = every(faster(m, metric, "ttur", "ttur-10"), steadier := _steadier(m, metric))
    as_steady = no_gain(m, "brightness_std", "ttur", "no-regression", AS_STEADY)
    refuted = steadier.verdict == "refuted" or (steadier.verdict == "undecided" and as_steady.verdict == "supported")
    verdict: Verdict = "supported" if both.verdict == "supported" else "refuted" if refuted else "undecided"
    equal = as_steady.rule.partition(";")[0]
    rule = (
        f"supported by both: {both.rule}. Refuted only if no-regression is as steady as ttur ((2) is not supported and "
        f"{equal}) or steadier, whichever of ttur and ttur-10 is ahead"
    )
    return Finding(verdict, f"{both.evidence}. As steady: {as_steady.evidence}", rule)


def _no_rescue(m: Measurements, metric: str) -> Finding:
    """C10: refuted only if TTUR brings GAN-only to the level of DMD2."""
    apart, close = lower(m, metric, "dmd2", "gan-only-ttur"), equivalent(m, metric, "gan-only-ttur", "dmd2")
    rescued = apart.verdict == "refuted" or close.verdict == "supported"
    verdict: Verdict = "refuted" if rescued else apart.verdict
    rule = f"supported if {apart.rule}; refuted if gan-only-ttur is lower, or equal: {close.rule}"
    return Finding(verdict, apart.evidence, rule)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: its text, the paper's numbers, the test on ours, and whether that is at equal time."""

    text: str
    paper: str
    test: Callable[[Measurements, str], Finding]
    timed: bool = False


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
        timed=True,
    ),
    "C5": Claim(
        "The ratio trades stability for speed: 5 is ahead of 10 at equal time, and steadier than 1",
        "Figure 9: 3.4 against 4.0 at 35 h; Figure 8: SD of brightness 0.006 against 0.051",
        _trade,
        timed=True,
    ),
    "C6": Claim(
        "At equal time, more critic updates are ahead of a larger critic learning rate",
        "Figure 9: 3.4 against 4.1 at 35 h",
        lambda m, metric: faster(m, metric, "ttur", "async-lr"),
        timed=True,
    ),
    "C7": Claim(
        "Adding the GAN loss gives a large gain",
        "Table 3: 2.61 to 1.51",
        lambda m, metric: lower(m, metric, "dmd2", "ttur"),
    ),
    "C8": Claim(
        "With real data the student beats its teacher's ODE sampler; without, it does not",
        "Tables 1 and 3: 1.51 and 2.61 against 2.32",
        lambda m, metric: every(lower(m, metric, "dmd2", "teacher-ode"), lower(m, metric, "teacher-ode", "ttur")),
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


def distance(metrics: Sequence[str]) -> str:
    """The metric that claims about quality judge: the first Frechet distance of a table's metrics."""
    return next((metric for metric in metrics if metric in FRECHET), FRECHET[0])


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
