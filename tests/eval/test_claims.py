"""Verdicts follow the rules of claims fixed beforehand."""

from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from dmd2.experiment.table_config import Claim, ClaimName, RuleName, Table
from dmd2.publish.table_text import mean_sd
from eval.report.claims import CLAIMS, claims_of, find, judge
from eval.report.rules import RULES, Measurements, below, equivalent, no_gain


def measured(**runs: list[float]) -> Measurements:
    return Measurements({(name.replace("_", "-"), "fd"): dict(enumerate(v)) for name, v in runs.items()})


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "supported"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "refuted"),
        ([1.0, 1.1, 2.5], [2.0, 2.1, 1.9], "undecided"),  # one seed disagrees
        ([1.0, 1.5, 0.5], [1.3, 1.8, 0.8], "undecided"),  # every seed agrees, but the gap is within the spread
        ([1.0, 1.1], [2.0, 2.1], "undecided"),  # two seeds
        ([1.0], [99.0], "undecided"),
    ],
)
def test_lower_needs_every_seed_and_a_gap_of_two_pooled_deviations(a, b, verdict) -> None:
    assert below(measured(a=a, b=b), "fd", "a", "b").verdict == verdict


def test_a_single_seed_says_how_many_it_needs() -> None:
    assert "measured with 1, needs 3 seeds" in below(measured(a=[1.0], b=[2.0]), "fd", "a", "b").evidence


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.01, -0.01, 0.0], "supported"),  # whole interval inside 5 % of 10
        ([2.0, 2.1, 1.9], "refuted"),  # whole interval outside
        ([0.9, -0.9, 0.1], "undecided"),  # not significantly different is no confirmation
        ([0.4, 0.6, 0.5], "undecided"),  # significantly different, yet not outside the margin
    ],
)
def test_equivalence_needs_the_whole_interval_inside_the_margin(gaps, verdict) -> None:
    m = measured(a=[10 + g for g in gaps], b=[10.0, 10.0, 10.0])
    assert equivalent(m, "fd", "a", "b").verdict == verdict


THREE = [1.0, 1.1, 0.9]


@pytest.mark.parametrize(
    ("claim", "runs", "verdict"),
    [
        ("C8", {"dmd2": THREE, "ttur": [3.0, 3.1, 2.9], "teacher_ode": [2.0]}, "supported"),  # one value for every seed
        ("C8", {"dmd2": THREE, "ttur": [1.2, 1.3, 1.1], "teacher_ode": [2.0]}, "refuted"),  # both are better
        ("C10", {"dmd2": THREE, "gan_only_ttur": [2.0, 2.1, 1.9]}, "supported"),
        ("C10", {"dmd2": THREE, "gan_only_ttur": [1.01, 1.11, 0.91]}, "refuted"),  # TTUR rescues it
        ("C12", {"dmd2": THREE, "published best": [1.92]}, "supported"),  # of other methods, one value for every seed
    ],
)
def test_a_claim_follows_the_values_of_its_rows(claim: str, runs: dict[str, list[float]], verdict: str) -> None:
    assert find(CLAIMS[claim], measured(**runs), "fd").verdict == verdict


def test_a_claim_whose_rows_are_missing_says_which() -> None:
    verdict = judge([CLAIMS["C7"]], measured(dmd2=[1.0]), "fd")[0]
    assert verdict["verdict"] == "undecided" and verdict["evidence"] == "not measured: fd of ttur"


def test_tables_may_name_exactly_the_claims_that_have_a_test_and_rules_that_exist() -> None:
    assert get_args(ClaimName) == tuple(CLAIMS) and get_args(RuleName) == tuple(RULES)


def test_a_claim_of_ones_own_is_judged_as_the_papers_are() -> None:
    values = {
        "metric": "distance",
        "a": "dmd2",
        "b": "ttur",
        "rule": "below",
        "claim": "The GAN loss helps",
        "id": "H1",
    }
    table = Table(title="", base="", rows=[], claims=["C7", values, {**values, "id": "H2", "rule": "above"}])
    m = measured(dmd2=THREE, ttur=[3.0, 3.1, 2.9])
    c7, own, reverse = judge(claims_of(table), m, "fd")
    assert (own["verdict"], own["evidence"], own["rule"]) == ("supported", c7["evidence"], c7["rule"])
    assert (own["id"], own["paper"], reverse["verdict"]) == ("H1", "", "refuted")
    two = Claim.model_validate({**values, "also": [{"metric": "fd", "a": "ttur", "b": "dmd2", "rule": "below"}]})
    assert find(two, m, "fd").verdict == "refuted"


def test_claims_use_the_metric_of_their_table() -> None:
    m = Measurements({("dmd2", "fid"): {0: 1.0}, ("ttur", "fid"): {0: 2.0}})
    assert "dmd2 1.00, ttur 2.00" in judge([CLAIMS["C7"]], m, "fid")[0]["evidence"]


def over_time(**runs: list[tuple[float, float]]) -> Measurements:
    """The same curve in three seeds, as one seed's values differ from another's by 0.01 only."""
    named = {(name.replace("_", "-"), "fd"): curve for name, curve in runs.items()}
    return Measurements({}, {k: {s: [(t, v + 0.01 * s) for t, v in c] for s in range(3)} for k, c in named.items()})


def test_runs_are_compared_when_the_quicker_one_ended() -> None:
    slow = [(100.0, 9.0), (200.0, 5.0), (400.0, 1.0)]  # better in the end, 4.0 after 250 s
    assert find(CLAIMS["C4"], over_time(ttur=[(100.0, 8.0), (250.0, 3.0)], dmd=slow), "fd").verdict == "supported"
    assert find(CLAIMS["C4"], over_time(ttur=[(100.0, 8.0), (250.0, 5.0)], dmd=slow), "fd").verdict == "refuted"
    x, y = over_time(a=[(100.0, 8.0), (250.0, 3.0)], b=slow).at_equal_time("fd", "a", "b")
    assert x == pytest.approx([3.0, 3.01, 3.02]) and y == pytest.approx([4.0, 4.01, 4.02])


def test_a_run_without_a_training_has_no_time() -> None:
    [verdict] = judge([CLAIMS["C6"]], over_time(ttur=[(1.0, 2.0)]), "fd")
    assert (verdict["verdict"], verdict["evidence"]) == ("undecided", "not measured: fd of async-lr")


def of_table_4(**changes: list[float]) -> Measurements:
    """Three seeds with the paper's orders; keys are ``row__metric`` with ``_`` for ``-`` in the row."""
    values = {
        "4step__fd": 19.3, "4step__patch_fd": 20.9, "4step__clip_score": 0.332, "4step_no_backsim__fd": 20.7,
        "4step_no_backsim__patch_fd": 24.2, "4step_no_dm__fd": 13.8, "4step_no_dm__patch_fd": 28.0,
        "4step_no_dm__clip_score": 0.307, "4step_no_gan__fd": 26.9, "4step_no_gan__saturation": 0.5,
        "4step_no_gan__sharpness": 0.02, "1step__fd": 19.0, "1step__patch_fd": 27.0,
    }  # fmt: skip
    found = {key: [v, 1.001 * v, 0.999 * v] for key, v in values.items()} | changes
    named = {(row.replace("_", "-"), m): dict(enumerate(v)) for key, v in found.items() for row, m in [key.split("__")]}
    return Measurements(named | {("teacher", "saturation"): {0: 0.4}, ("teacher", "sharpness"): {0: 0.03}})


@pytest.mark.parametrize("claim", ["C13", "C14", "C15", "C16"])
def test_the_papers_orders_support_the_claims_on_text(claim) -> None:
    assert find(CLAIMS[claim], of_table_4(), "fd").verdict == "supported"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("C13", {"4step_no_backsim__patch_fd": [20.0, 20.1, 19.9]}),  # no detail is gained
        ("C13", {"4step_no_backsim__fd": [18.0, 18.1, 17.9]}),
        ("C14", {"4step_no_dm__fd": [21.0, 21.1, 20.9]}),
        ("C14", {"4step_no_dm__clip_score": [0.35, 0.351, 0.349]}),
        ("C14", {"4step_no_dm__patch_fd": [18.0, 18.1, 17.9]}),
        ("C15", {"4step_no_gan__fd": [17.0, 17.1, 16.9]}),
        ("C15", {"4step_no_gan__saturation": [0.3, 0.31, 0.29]}),  # paler than the teacher's
        ("C15", {"4step_no_gan__sharpness": [0.04, 0.041, 0.039]}),
        ("C16", {"1step__patch_fd": [18.0, 18.1, 17.9]}),
        ("C16", {"1step__fd": [25.0, 25.1, 24.9]}),  # then four steps buy global quality, too
    ],
)
def test_each_part_of_a_claim_on_text_can_refute_it(claim, changes) -> None:
    assert find(CLAIMS[claim], of_table_4(**changes), "fd").verdict == "refuted"


@pytest.mark.parametrize(
    ("one_step", "verdict"),
    [
        ([12.0, 12.1, 11.9], "supported"),  # four steps are even worse: no gain either
        ([20.0, 20.1, 19.9], "supported"),  # lower by less than the margin
        ([20.0, 22.5, 19.0], "undecided"),
        ([25.0, 25.1, 24.9], "refuted"),
    ],
)
def test_no_gain_is_lost_only_beyond_the_margin(one_step, verdict) -> None:
    assert no_gain(of_table_4(**{"1step__fd": one_step}), "fd", "4step", "1step").verdict == verdict


def test_a_claim_may_have_a_margin_of_its_own() -> None:
    """The values differ by 1.6 %: inside of the margin by default, beyond that of F4."""
    m, own = measured(full=[0.6, 0.601, 0.599], shared=[0.61, 0.611, 0.609]), {"id": "own", "claim": "", "metric": "fd"}
    for rule, verdicts in {"equivalent": ["supported", "refuted"], "no_gain": ["supported", "refuted"]}.items():
        claims = [Claim(**own, a="full", b="shared", rule=rule, margin=margin) for margin in (None, 0.01)]
        assert [find(claim, m, "fd").verdict for claim in claims] == verdicts
        narrow = find(Claim(**own, a="full", b="shared", rule=rule, margin=0.005), m, "fd")
        assert "0.5% of shared" in narrow.rule
    assert [test.margin for test in CLAIMS["F4"].tests] == [None, None, 0.01]
    with pytest.raises(ValidationError, match="margin is of the rules equivalent and no_gain, and rule is below"):
        Claim(**own, a="a", b="b", rule="below", margin=0.1)


def test_patch_distance_has_the_kind_of_the_tables_distance() -> None:
    [verdict] = judge(
        [CLAIMS["C13"]], Measurements({(r, "fid"): {0: 1.0} for r in ("4step", "4step-no-backsim")}), "fid"
    )
    assert verdict["evidence"] == "not measured: patch_fid of 4step"


def test_c2_and_the_second_half_of_c5_are_one_test() -> None:
    steady, restless = dict(enumerate([0.006, 0.007, 0.005])), dict(enumerate([0.05, 0.06, 0.04]))
    m = Measurements({("ttur", "brightness_std"): steady, ("no-regression", "brightness_std"): restless})
    curves = over_time(**{"ttur": [(10.0, 1.0)], "ttur_10": [(10.0, 2.0)]}).curves
    c2, c5 = (find(CLAIMS[name], Measurements(m.values, curves), "fd") for name in ("C2", "C5"))
    assert c2.verdict == c5.verdict == "supported" and c2.evidence in c5.evidence and c2.rule in c5.rule


@pytest.mark.parametrize("constant", ["teacher-ode", "published best"])
@pytest.mark.parametrize(("gap", "verdict"), [(0.17, "undecided"), (0.21, "supported")])  # at 1.7 and at 2.1 SD
def test_against_one_value_the_gap_is_twice_the_sd_of_the_arm_that_has_seeds(constant, gap, verdict) -> None:
    m = Measurements({("dmd2", "fd"): {0: 1.0, 1: 1.1, 2: 0.9}, (constant, "fd"): {0: 1.0 + gap}})
    found, reverse = below(m, "fd", "dmd2", constant), below(m, "fd", constant, "dmd2")
    assert (found.verdict, reverse.verdict) == (verdict, verdict.replace("supported", "refuted"))
    assert f"twice the seed SD of dmd2 ({constant} has one value)" in found.rule and "pooled" not in found.rule
    assert f"{constant} {1 + gap:g}; " in found.evidence and "SD of dmd2 0.1" in found.evidence


def of_c5(five: list[float], one: list[float], ten: float = 2.0) -> Measurements:
    """Brightness SD of ratios 5 and 1 by seed; FD 1 of ratio 5 and `ten` of ratio 10 at equal time."""
    curves = over_time(**{"ttur": [(10.0, 1.0)], "ttur_10": [(10.0, ten)]}).curves
    steadiness = {"ttur": five, "no-regression": one}
    return Measurements({(run, "brightness_std"): dict(enumerate(v)) for run, v in steadiness.items()}, curves)


STEADY, RESTLESS = [0.006, 0.007, 0.005], [0.05, 0.06, 0.04]


@pytest.mark.parametrize(
    ("five", "one", "ten", "verdict"),
    [
        (STEADY, RESTLESS, 2.0, "supported"),
        (STEADY, RESTLESS, 0.5, "undecided"),  # another optimum than 5
        (STEADY, [0.0061, 0.0069, 0.0052], 2.0, "refuted"),  # ratio 1 as steady as ratio 5
        (STEADY, [0.0061, 0.0069, 0.0052], 0.5, "refuted"),
        (RESTLESS, STEADY, 2.0, "refuted"),  # or steadier
        (STEADY, [0.012, 0.008, 0.0055], 2.0, "undecided"),  # less steady, neither clearly nor by little
        (STEADY, [0.05, 0.2, 0.004], 2.0, "undecided"),
        (STEADY[:2], STEADY[:2], 2.0, "undecided"),  # too few seeds to refute
    ],
)
def test_c5_is_refuted_by_a_steady_ratio_1_and_by_nothing_else(five, one, ten, verdict) -> None:
    found = find(CLAIMS["C5"], of_c5(five, one, ten), "fd")
    assert found.verdict == verdict, found.evidence
    assert "Refuted only if no-regression is as steady as ttur" in found.rule


def test_before_its_first_snapshot_a_run_has_no_value_to_compare() -> None:
    late = over_time(ttur=[(100.0, 8.0)], dmd=[(200.0, 5.0), (400.0, 1.0)])
    [verdict] = judge([CLAIMS["C4"]], late, "fd")
    assert verdict["verdict"] == "undecided"
    assert verdict["evidence"] == "not measured: fd at 100 s, before the first snapshot (200 s), of dmd"


def test_a_student_worse_than_its_teacher_is_said_as_it_is() -> None:
    found = find(CLAIMS["C8"], measured(dmd2=THREE, ttur=[3.0, 3.1, 2.9], teacher_ode=[2.0]), "fd")
    assert "(2) supported: teacher-ode 2.00, ttur 3.00 ± 0.10; teacher-ode lower in 3 of 3 seeds" in found.evidence


def test_equal_seeds_have_an_sd_of_0() -> None:
    assert mean_sd(np.array([0.9, 0.9])) == "0.900 ± 0" and mean_sd(np.array([0.9])) == "0.900"
