"""`dmd2 compare` on workspaces: what is subtracted from what, with which interval, and what CI is told."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t, ttest_ind
from typer.testing import Result

from dmd2.core.files import read_json, write_json
from eval.compare.contrasts import verdict_on
from tests.eval import compare_places
from tests.eval.compare_places import THREE, psi, student, teacher


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Two workspaces, empty yet."""
    return tmp_path / "a", tmp_path / "b"


def run(places: tuple[Path, Path], *options: str) -> Result:
    return compare_places.run(*map(str, places), *options)


def document(places: tuple[Path, Path], *options: str) -> dict[str, Any]:
    out = places[0].parent / "out.json"
    result = run(places, "--json", str(out), *options)
    assert result.exit_code == 0, result.stderr
    return read_json(out)


def only(places: tuple[Path, Path], *options: str) -> dict[str, Any]:
    (row,) = document(places, *options)["rows"]
    return row


def of_mean(gaps: list[float]) -> float:
    """Half of the paired t-interval."""
    return t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5


def welch(b: list[float]) -> float:
    """Half of Welch's interval against `THREE`."""
    low, high = ttest_ind(b, [*THREE.values()], equal_var=False).confidence_interval(0.95)
    return (high - low) / 2


UNPAIRED = "training seeds, unpaired"


@pytest.mark.parametrize(
    ("b", "seeds", "covers", "value", "half"),
    [
        ({0: 8.0, 1: 8.6, 2: 7.4}, "seeds 0, 1, 2: paired", "training seeds", -1, of_mean([-1.0, -0.9, -1.1])),
        ({1: 9.7, 2: 8.9, 7: 500.0}, "A has seeds 0, 1, 2; B 1, 2, 7: paired over 1, 2", "training seeds", 0.3, of_mean([0.2, 0.4])),
        ({3: 12.0, 4: 12.5, 5: 12.2}, "A has seeds 0, 1, 2; B 3, 4, 5: unpaired, Welch interval", UNPAIRED, 9.7 / 3, welch([12.0, 12.5, 12.2])),
        ({2: 10.0, 3: 10.4}, "A has seeds 0, 1, 2; B 2, 3 (2 on both sides): unpaired, Welch interval", UNPAIRED, 1.2, welch([10.0, 10.4])),
        ({5: 10.0}, "A has seeds 0, 1, 2; B 5: unpaired, the spread of B over seeds taken to be that of A", f"{UNPAIRED}, one spread assumed", 1,
         t.ppf(0.975, 2) * np.std([*THREE.values()], ddof=1) * (1 + 1 / 3) ** 0.5),
    ],
)  # fmt: skip
def test_the_interval_follows_from_the_seeds_that_both_sides_have(
    b: dict[int, float], seeds: str, covers: str, value: float, half: float, places: tuple[Path, Path]
) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", b)
    row, text = only(places), run(places).stdout
    found, shared = row["difference"], [str(seed) for seed in b if seed in THREE]
    assert (row["seeds"], found["covers"]) == (seeds, covers) and f"| {covers} |" in text
    assert (found["value"], found["low"], found["high"]) == pytest.approx((value, value - half, value + half))
    assert row["verdict"] == ("worse" if value > half else "better" if value < -half else "no difference shown")
    assert (f"- {seeds}" in text) == seeds.startswith("A has")
    paired = "unpaired" not in seeds
    assert [*row["a"]] == (shared if paired else ["0", "1", "2"]) and [*row["b"]] == (
        shared if paired else [*map(str, b)]
    )
    assert row["grids"]["seeds"] == ([min(map(int, shared))] * 2 if shared else [0, min(b)])
    assert ((found["sampling_se"] or 0) > 0) == paired


def test_one_changed_hyper_parameter_and_another_commit_are_said(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", THREE, {"critic.ratio": 10}, commit="0ddba11c0")
    text = run(places).stdout
    assert "- config `critic.ratio`: `5` → `10`" in text and text.count("- config") == 1
    assert "- trained at commit: 4be1c02d9 → 0ddba11c0" in text


def test_other_code_of_the_method_is_told_where_both_sides_know_theirs(places: tuple[Path, Path]) -> None:
    old = {"dmd2.method.batches": "a", "dmd2.method.step": "b"}
    student(places[0], "dmd2", THREE, code=old)
    student(places[1], "dmd2", THREE)
    assert "trained by other code" not in run(places).stdout
    for modules, told in (
        ({**old, "dmd2.method.batches": "c"}, True),
        ({"dmd2.x.losses": "a", "dmd2.x.step": "b"}, False),
    ):
        student(places[1], "dmd2", THREE, code=modules)
        assert ("- trained by other code: dmd2/method/batches.py differ" in run(places).stdout) is told


def test_without_influences_the_seeds_are_paired_all_the_same(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", {0: 8.0, 1: 8.6, 2: 7.4})
    whole = only(places)["difference"]
    (places[1] / "results/runs/digits/dmd2/seed1/influence.safetensors").unlink()
    bare = only(places)["difference"]
    assert (bare["low"], bare["high"]) == pytest.approx((whole["low"], whole["high"]))
    assert bare["sampling_se"] is None


@pytest.mark.parametrize("seed", [0, 1])
def test_one_seed_each_pairs_the_images(seed: int, places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", {0: 9.0})
    student(places[1], "dmd2", {seed: 9.1})
    found = only(places)["difference"]
    gaps = (psi(seed, 9.1, 0.1).astype(float) - psi(0, 9.0, 0.1)).reshape(20, 10)
    se = np.sqrt(np.sum(20 * gaps.var(axis=0, ddof=1))) / 200  # labels are cyclic: ten classes of 20 images
    assert found["covers"] == "finite sample"
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * se)
    assert ("A has seed 0; B 1" in run(places).stdout) == (seed == 1)


def test_one_seed_each_without_influences_adds_standard_errors(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", {0: 9.0}, se=0.3)
    student(places[1], "dmd2", {0: 9.1}, se=0.4)
    (places[0] / "results/runs/digits/dmd2/seed0/influence.safetensors").unlink()
    found = only(places)["difference"]
    assert found["covers"] == "finite sample, unpaired"
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5)


def test_too_few_images_for_a_standard_error_give_no_interval(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", {0: 9.0}, se=None)
    student(places[1], "dmd2", {0: 9.1}, se=None)
    row = only(places)
    assert (row["difference"], row["verdict"]) == (None, "not comparable")
    assert "- the finite sample has no standard error" in run(places).stdout


def test_other_protocols_are_refused_with_the_keys_named(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", THREE, protocol={"rounding": "floor", "images": 100})
    row, text = only(places), run(places, "--fail-if-worse")
    assert (row["difference"], row["a"], row["others"], row["verdict"]) == (None, {}, {}, "not comparable")
    said = "measured by different protocols: images is 200 in A, 100 in B; rounding is round in A, floor in B"
    assert f"- {said}" in text.stdout
    assert (text.exit_code, text.stderr) == (1, f"digits/dmd2 cannot be compared: {said}\n")


def last(place: Path, seed: int, **values: float) -> None:
    """Change metrics of the last snapshot of digits/dmd2."""
    path = place / f"results/runs/digits/dmd2/seed{seed}/metrics.json"
    record = read_json(path)
    record["snapshots"][-1] |= values
    write_json(path, record)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda b: student(b, "dmd2", THREE, protocol={"geometry": "none"}),  # which an older version did not record
         "measured by different protocols: geometry is absent in A, none in B"),
        (lambda b: student(b, "dmd2", {1: 9.0}, {"critic.ratio": 10}), "the seeds of B differ among themselves in critic.ratio"),
        (lambda b: student(b, "dmd2", {1: 9.0}, {"train.log_every": 7}), ""),
        (lambda b: last(b, 1, fd=float("nan")), "fd of B, seed 1, is nan"),
        (lambda b: last(b, 1, fd=float("inf")), "fd of B, seed 1, is inf"),
        (lambda b: student(b, "dmd2", THREE, {"eval.metrics": ["kid", "fd"]}), "neither side has kid"),
    ],
)  # fmt: skip
def test_what_is_not_compared_says_why(edit: Callable[[Path], None], reason: str, places: tuple[Path, Path]) -> None:
    for place in places:
        student(place, "dmd2", THREE)
    edit(places[1])
    assert only(places)["reason"] == reason


@pytest.mark.parametrize("seeds", [range(1), range(3)])
def test_the_order_of_sums_is_no_difference(seeds: range, places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", {s: 9.0 + s for s in seeds}, se=None)
    student(places[1], "dmd2", {s: (9.0 + s) * (1 + 1e-9) for s in seeds}, se=None)
    row = only(places)
    assert (row["difference"]["covers"], row["verdict"]) == ("equal", "no difference shown")
    assert only(places, "--margin", "0")["others"]["accuracy"]["difference"]["covers"] == "equal"


def test_other_numbers_although_nothing_changed_are_listed(places: tuple[Path, Path]) -> None:
    for place, fd in zip(places, (9.0, 9.1), strict=True):
        student(place, "dmd2", {0: fd, 1: 9.0})
        student(place, "ttur", THREE)
    text = run(places).stdout
    assert "as far as recorded: `digits/dmd2`, `digits/ttur`." in text
    assert "These of them have other numbers although nothing recorded changed: `digits/dmd2`." in text


def test_rows_of_which_the_same_is_said_are_said_together(places: tuple[Path, Path]) -> None:
    for place, commit in zip(places, ("aaa", "bbb"), strict=True):
        student(place, "dmd2", THREE, commit=commit)
        student(place, "ttur", THREE, commit=commit)
    said = "`digits/dmd2`, `digits/ttur`: no difference shown\n\n- trained at commit: aaa → bbb\n"
    assert said in run(places).stdout
    assert run(places).stdout.count("\n## digits\n") == 1


def test_a_damaged_influence_is_said(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", {0: 9.2, 1: 9.4, 2: 8.6})
    path = places[1] / "results/runs/digits/dmd2/seed2/influence.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "does not match the checksum" in only(places)["reason"]


def test_ci_hears_a_sentence_per_row(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", {0: 12.0, 1: 12.6, 2: 11.4})
    student(places[0], "old", THREE)
    student(places[1], "new", THREE)
    for place in places:
        student(place, "same", THREE)
    result = run(places, "--fail-if-worse")
    assert result.exit_code == 1
    gone = f"digits/old is gone: only A ({places[0]}) has it"
    assert result.stderr.splitlines() == ["digits/dmd2 got worse: FD +3.00 [+2.75, +3.25]", gone]
    assert "Rows only in A: `digits/old`." in result.stdout and "Rows only in B: `digits/new`." in result.stdout
    assert "| `same` | 9.00 ± 0.50 | 9.00 ± 0.50 | equal | – |" in result.stdout
    assert run(places).exit_code == 0
    shutil.rmtree(places[0] / "results/runs/digits/old")
    assert run(places, "--fail-if-worse", "--margin", "2.5").exit_code == 1
    assert run(places, "--fail-if-worse", "--margin", "3.5").exit_code == 0


def test_a_seed_laid_aside_is_no_seed(places: tuple[Path, Path]) -> None:
    for place in places:
        student(place, "dmd2", THREE)
    folder = places[0] / "results/runs/digits/dmd2"
    shutil.copytree(folder / "seed0", folder / "seed0-old")
    assert only(places)["seeds"] == "seeds 0, 1, 2: paired"


def test_what_got_better_passes(places: tuple[Path, Path]) -> None:
    student(places[0], "dmd2", {0: 12.0, 1: 12.6, 2: 11.4})
    student(places[1], "dmd2", THREE)
    result = run(places, "--fail-if-worse")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Rows on both sides: 1 better." in result.stdout


@pytest.mark.parametrize(
    ("low", "high", "better", "margin", "verdict"),
    [
        (1, 2, "lower", 0, "worse"), (1, 2, "higher", 0, "better"), (-2, -1, "lower", 0, "better"),
        (-2, -1, "higher", 0, "worse"), (-1, 2, "lower", 0, "no difference shown"),
        (1, 2, "lower", 1.5, "no difference shown"), (-2, -1, "higher", 1.5, "no difference shown"),
        (-2, -1, "lower", 1.5, "no difference shown"),
        (1.6, 2, "lower", 1.5, "worse"), (0, 0, "lower", 0, "no difference shown"), (1, 2, None, 0, "not comparable"),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, better: str | None, margin: float, verdict: str) -> None:
    assert verdict_on({"low": low, "high": high}, better, margin) == verdict


def test_the_first_metric_with_a_direction_decides(places: tuple[Path, Path]) -> None:
    order = {"eval.metrics": ["brightness", "accuracy", "fd"]}
    student(places[0], "dmd2", THREE, order)
    student(places[1], "dmd2", {0: 12.0, 1: 12.6, 2: 11.4}, order)
    row = only(places)
    assert (row["metric"], row["verdict"]) == ("accuracy", "worse")
    assert row["others"].keys() == {"brightness", "fd", "brightness_std"}


def test_the_parts_of_a_metric_that_comes_first_decide(places: tuple[Path, Path]) -> None:
    for place, recall in zip(places, (0.6, 0.4), strict=True):
        student(place, "dmd2", THREE, {"eval.metrics": ["prdc", "fd"]})
        for seed in THREE:
            last(place, seed, precision=recall + seed / 100, recall=recall)
    row = only(places)
    assert (row["metric"], row["better"], row["verdict"]) == ("precision", "higher", "worse")


def test_teachers_are_compared_over_the_finite_sample(places: tuple[Path, Path]) -> None:
    for place, fd in zip(places, (2.0, 4.0), strict=True):
        student(place, "dmd2", THREE)
        teacher(place, "ode", fd)
    row = next(row for row in document(places)["rows"] if row["run"] == "teacher-ode")
    assert (row["metric"], row["difference"]["covers"], row["verdict"]) == ("fd", "finite sample", "worse")


@pytest.mark.parametrize("same_config", [True, False])
def test_other_inputs_are_told_by_key_only_where_the_config_is_the_same(
    same_config: bool, places: tuple[Path, Path]
) -> None:
    student(places[0], "dmd2", THREE)
    student(places[1], "dmd2", THREE, {} if same_config else {"optim.lr": 1e-3}, key="other")
    said = "- data, teacher or pairs had other content in training (seeds 0, 1, 2): the keys differ"
    assert (said in run(places).stdout) == same_config


def test_another_teacher_and_machine_are_named(places: tuple[Path, Path]) -> None:
    for place, digest, device in zip(places, ("aa", "bb"), ("cpu", "1 x H100"), strict=True):
        student(place, "dmd2", THREE, device=device, key=device)
        write_json(place / "data/teachers/digits-edm/manifest.json", {"files": [{"sha256": digest}]})
        write_json(place / "data/real/digits/manifest.json", {"files": [{"sha256": "cc"}]})
    text = run(places).stdout
    assert re.search(r"- teacher digits-edm has other content: [0-9a-f]{12} → [0-9a-f]{12}\n", text)
    assert "data digits" not in text and "the keys differ" not in text
    assert "- trained on: cpu → 1 x H100" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere is neither a folder nor a git revision nor a DVC experiment here: "),
        (["empty"], r"error: empty \(tables in .*\) has no results: "),
        (["file"], "error: file is a file: give the folder"),
        (["./a", "./c"], r"error: no row is on both sides: A \(./a\) has digits/dmd2; B \(./c\) has digits/other"),
        (["./a", "./broken"], "error: results/runs/digits/dmd2/seed0/metrics.json of ./broken has no 'protocol': "),
        (["./a", "--margin", "-1"], "Invalid value for '--margin'"),
    ],
)
def test_bad_input_exits_with_2(arguments: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    student(Path("a"), "dmd2", THREE)
    student(Path("c"), "other", THREE)
    write_json(Path("broken/results/runs/digits/dmd2/seed0/metrics.json"), {"snapshots": [{"step": 1}], "config": {}})
    result = compare_places.run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr


def test_b_is_the_workspace_if_not_given(places: tuple[Path, Path], monkeypatch) -> None:
    for place in places:
        student(place, "dmd2", THREE)
    monkeypatch.chdir(places[1])
    result = compare_places.run(str(places[0] / "results"))
    assert result.exit_code == 0 and f"B: workspace (workspace in {places[1]})" in result.stdout
