"""Sets, teachers and pipelines are shared by name: two definitions of one name are refused with both places."""

import pytest

from dmd2.experiment.checks.tables import definitions
from tests import tiny
from tests.experiment_folder import line_of

TRAINING = {"steps": 2, "batch": 2, "lr": 1e-3, "warmup": 0, "ema": 0.9, "p_mean": -1.1, "label_dropout": 0.1}
NETWORK = {key: list(value) if isinstance(value, tuple) else value for key, value in tiny.KINDS["edm"][2].items()}


def base_with(**changes):
    return tiny.values("edm", **{"teacher__train": TRAINING, "teacher__network": {**NETWORK}, **changes})


@pytest.mark.parametrize(("change", "key", "there", "here"), [
    ({"data__source": {"kind": "idx", "path": "here"}}, "data.source.kind", "latents", "idx"),
    ({"teacher__train": {**TRAINING, "p_mean": -1.0}}, "teacher.train.p_mean", "-1.1", "-1.0"),
    ({"data__name": "other"}, "data.name", "tiny", "other"),
], ids=["set", "teacher", "set of a teacher trained here"])  # fmt: skip
def test_two_bases_may_not_define_one_name_otherwise(folder, change, key, there, here):
    folder.base("tiny", base_with())
    folder.base("wide", base_with(**change))
    folder.table("one")
    folder.table("two", base="wide")
    error = folder.error()
    first, second = (folder.bases / f"{name}.yaml" for name in ("tiny", "wide"))
    needle = key.split(".")[-1] + ":"
    assert f"({key}: {there} there, {here} here): give one of them another" in error
    assert error.startswith(f"{second}:{line_of(second, needle)}: ") and f"{first}:{line_of(first, needle)} " in error


def test_a_row_may_not_change_what_is_shared(folder):
    folder.base("tiny", base_with())
    folder.table(rows=[{"run": "a"}, {"run": "b", "change": {"teacher.train.steps": 9}}])
    error, path = folder.error(), folder.tables / "one.yaml"
    assert error.startswith(f"{path}:{line_of(path, 'teacher.train.steps')}: row b: teacher tiny is defined as another")


def test_a_row_may_name_another_teacher_and_change_guidance(folder):
    folder.base("tiny", base_with())
    named = {"teacher.name": "longer", "teacher.train.steps": 9}
    folder.table(rows=[{"run": "a", "change": {"teacher.guidance": 1.5}}, {"run": "b", "change": named}])
    assert folder.load().runs["tiny", "b"].teacher.train.steps == 9


def test_how_a_run_guides_a_flow_teacher_defines_no_other_teacher_but_other_pairs():
    plain, rescaled = (tiny.config("flow-sd3", teacher__rescale=value) for value in (None, "row"))
    assert list(definitions(plain)) == list(definitions(rescaled)) and plain.pair_set != rescaled.pair_set
