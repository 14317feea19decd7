"""The record of what an artefact was made from, and what it calls out of date."""

import json

import pytest

from dmd2.core.errors import UserError
from dmd2.core.files import digest_of, read_json, write_json
from dmd2.core.provenance import Artefact, altered, content, made_from, outdated, recorded


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "in.json", {"kind": "real", "files": [{"sha256": "a"}]})
    with recorded(tmp_path / "out.json", {"x": 1}, ["in.json"]):
        write_json(tmp_path / "out.json", {"kind": "run"})
    return tmp_path


def out(config=None, inputs=("in.json",)) -> Artefact:
    return Artefact(["out.json"], config or {"x": 1}, list(inputs))


def test_what_was_just_made_is_up_to_date(folder) -> None:
    assert out().outdated() is None
    assert read_json(folder / "out.json")["kind"] == "run"


def test_other_settings_another_input_and_a_new_input_are_named(folder) -> None:
    assert out({"x": 2}).outdated() == "was made with other settings (x from 1 to 2)"
    write_json(folder / "more.json", {})
    assert out(inputs=("in.json", "more.json")).outdated() == "was made without more.json"
    write_json(folder / "in.json", {"kind": "real", "files": [{"sha256": "b"}]})
    assert out().outdated() == "was made from another in.json"


def test_settings_that_differ_are_named_by_their_keys_with_both_values(folder) -> None:
    then, now = (
        {"data": {"source": "a" * 50}, "w": 1, "x": [1, 2]},
        {"data": {"source": "b"}, "w": 2, "y": None, "z": 0},
    )
    with recorded(folder / "out.json", [then, {"seed": 1}]):
        write_json(folder / "out.json", {"kind": "run"})
    assert (
        Artefact(["out.json"], [then, {"seed": 2}], []).outdated() == "was made with other settings (seed from 1 to 2)"
    )
    told = f"data.source from {'a' * 37}... to b, w from 1 to 2, x from [1, 2] to the default, 2 more"
    assert Artefact(["out.json"], [now, {"seed": 1}], []).outdated() == f"was made with other settings ({told})"
    assert Artefact(["out.json"], [now], []).outdated() == "was made with other settings"


def test_input_whose_files_are_the_same_is_the_same_whenever_it_was_made(folder) -> None:
    write_json(folder / "in.json", {"kind": "real", "seconds": 7, "files": [{"sha256": "a"}]})
    assert out().outdated() is None


def test_missing_input_counts_as_unchanged(folder) -> None:
    (folder / "in.json").unlink()
    assert out().outdated() is None


def test_what_another_process_makes_is_not_made_a_second_time(folder) -> None:
    making, refused = (
        recorded(folder / "out.json", {}),
        pytest.raises(UserError, match=r"another process makes out\.json"),
    )
    with making, refused, recorded(folder / "out.json", {}):
        pytest.fail("two makers")
    with recorded(folder / "out.json", {}), recorded(folder / "other.json", {}):
        write_json(folder / "other.json", {})


def chain(folder) -> list[Artefact]:
    """first.json <- second.json <- third.json; settings of the first are 1."""
    for name, config, inputs in (("first", 1, []), ("second", {}, ["first.json"]), ("third", {}, ["second.json"])):
        with recorded(folder / f"{name}.json", config, inputs):
            write_json(folder / f"{name}.json", {"kind": name})
    return chained(1)


def chained(first: int) -> list[Artefact]:
    second, third = Artefact(["second.json"], {}, ["first.json"]), Artefact(["third.json"], {}, ["second.json"])
    return [Artefact(["first.json"], first, []), second, third]


def test_absent_link_of_the_chain_counts_as_unchanged(folder) -> None:
    artefacts = chain(folder)
    (folder / "first.json").unlink()
    (folder / "second.json").unlink()
    assert outdated(artefacts) == {}


def test_change_behind_a_link_that_a_killed_job_deleted_is_seen(folder) -> None:
    artefacts = chain(folder)
    (folder / "second.json").unlink()  # Snakemake deletes an output before its job starts
    with recorded(folder / "first.json", 1, []):
        write_json(folder / "first.json", {"kind": "remade"})
    assert outdated(artefacts) == {"third.json": "was made from another first.json"}


def test_changed_settings_of_what_is_not_here_are_seen(folder) -> None:
    chain(folder)
    (folder / "first.json").unlink()
    (folder / "second.json").unlink()
    assert outdated(chained(2)) == {"third.json": "was made from a first.json of other settings"}


def test_join_hands_on_origins_but_not_its_parts(folder) -> None:
    chain(folder)
    assert set(made_from(None, ["third.json"])["origins"]) == {"first.json", "second.json"}


@pytest.mark.parametrize("change", [{"kind": "tampered"}, {"more": 1}])
def test_edited_json_is_seen(folder, change) -> None:
    assert not altered(folder / "out.json")
    write_json(folder / "out.json", read_json(folder / "out.json") | change)
    assert out().outdated() == "was changed after it was made" and altered(folder / "out.json")


def test_file_beside_that_is_of_another_time_is_seen(folder) -> None:
    with recorded(folder / "t.json", {}, [], beside=["t.md"]):
        (folder / "t.md").write_text("new")
        write_json(folder / "t.json", {})
    artefact = Artefact(["t.json", "t.md"], {}, [])
    assert artefact.outdated() is None
    (folder / "t.md").write_text("old")
    assert artefact.outdated() == "was not made together with t.md"


@pytest.mark.parametrize("record", [{}, 3, {"config": "x"}, {"config": digest_of({"x": 1}), "inputs": []}])
def test_damaged_record_is_named(folder, record) -> None:
    write_json(folder / "out.json", {"kind": "run", "made_from": record})
    assert out().outdated() in ("has a damaged record of what it was made from", "was made with other settings")


def test_record_is_of_the_inputs_before_the_work(folder) -> None:
    with recorded(folder / "out.json", {"x": 1}, ["in.json"]):
        write_json(folder / "in.json", {"kind": "real", "files": [{"sha256": "changed meanwhile"}]})
    assert out().outdated() == "was made from another in.json"


def test_failed_work_leaves_no_record(folder) -> None:
    (folder / "out.json").unlink()
    with pytest.raises(ValueError, match="failed"), recorded(folder / "out.json", {"x": 1}):
        raise ValueError("failed")
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize(("kind", "reason"), [("real", None), ("run", "does not say what it was made from")])
def test_only_what_a_person_may_have_put_there_needs_no_record(folder, kind, reason) -> None:
    write_json(folder / "out.json", {"kind": kind})
    assert out().outdated() == reason


def test_page_carries_its_record_in_a_comment(folder) -> None:
    record = json.dumps(made_from(None, ["in.json"]))
    (folder / "page.html").write_text(f"<!-- made from {record} -->\n<html>")
    assert Artefact(["page.html"], None, ["in.json"]).outdated() is None
    (folder / "page.html").write_text("<html>")
    assert Artefact(["page.html"], None, ["in.json"]).outdated() == "is damaged"


def test_metrics_are_their_numbers_not_only_their_files(folder) -> None:
    write_json(folder / "m.json", {"kind": "metrics", "fd": 1.0, "files": [{"sha256": "a"}]})
    before = content("m.json")
    write_json(folder / "m.json", {"kind": "metrics", "fd": 2.0, "files": [{"sha256": "a"}]})
    assert content("m.json") != before


def test_metrics_are_of_one_training_though_another_gave_equal_weights(folder) -> None:
    run = {"kind": "run", "key": "a", "files": [{"sha256": "w"}]}
    write_json(folder / "train.json", run)
    with recorded(folder / "metrics.json", {}, ["train.json"]):
        write_json(folder / "metrics.json", {"kind": "metrics", "key": "a"})
    artefact = Artefact(["metrics.json"], {}, ["train.json"])
    assert artefact.outdated() is None
    write_json(folder / "train.json", {**run, "key": "b"})
    assert artefact.outdated() == "was made from another train.json"
