"""The sides of a comparison: two revisions and an experiment of a real git and DVC repository, folders of tables."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dmd2.core.files import read_json, write_json
from eval.compare.versions import open_side
from eval.report.tables import build
from tests.browser import fake_results
from tests.eval.compare_places import THREE, run, student
from tests.fork_server import quick_bin


def shell(*command: str) -> None:
    """Run git or DVC here, with this environment's DVC and no one's settings."""
    env = os.environ | {"PATH": f"{quick_bin()}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull}
    env["DVC_NO_ANALYTICS"] = "1"
    who = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(command, env=env | who, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags `old` and `new` (dmd2 with other seeds and another ratio), experiment `tried`; runs in DVC, a table in git."""
    place = tmp_path_factory.mktemp("repository")
    stage = {"cmd": "true", "outs": [{"results/runs/digits": {"persist": True}}]}
    with chdir(place):
        shell("git", "init", "-q")
        shell("dvc", "init", "-q")
        write_json(place / "dvc.yaml", {"stages": {"digits": stage}})  # JSON is YAML
        _table("undecided")
        student(place, "dmd2", THREE)
        student(place, "ttur", THREE)
        _commit("old")
        shutil.rmtree("results/runs/digits/dmd2")
        student(place, "dmd2", {3: 12.0, 4: 12.6, 5: 12.3}, {"critic.ratio": 10})
        _table("refuted")
        _commit("new")
        student(place, "dmd2", {3: 5.0, 4: 5.5, 5: 4.5}, {"critic.ratio": 20})
        shell("dvc", "commit", "-f", "-q")
        shell("dvc", "exp", "save", "-q", "-n", "tried")
    return place


def _commit(tag: str) -> None:
    shell("dvc", "commit", "-f", "-q")
    shell("git", "add", "-A")
    shell("git", "commit", "-q", "-m", tag)
    shell("git", "tag", tag)


def _table(verdict: str) -> None:
    claim = {
        "id": "C7",
        "claim": "Adding the GAN loss gives a large gain",
        "verdict": verdict,
        "evidence": f"{verdict}!",
    }
    table = {"name": "digits-table3", "base": "digits", "metrics": ["fd"], "rows": [], "claims": [claim]}
    write_json(Path("results/tables/digits-table3.json"), table)


def test_between_two_revisions_it_says_both_what_was_retrained_and_what_was_changed(repository: Path) -> None:
    with chdir(repository):
        result = run("old", "new", "--fail-if-worse")
    assert result.exit_code == 1
    assert re.fullmatch(r"digits/dmd2 got worse: FD \+3\.30 \[\+2\.\d\d, \+4\.\d\d\]\n", result.stderr)
    assert "- A has seeds 0, 1, 2; B 3, 4, 5: unpaired, Welch interval" in result.stdout
    assert "- config `critic.ratio`: `5` → `10`" in result.stdout
    assert "`ttur` | 9.00 ± 0.50 | 9.00 ± 0.50 | equal | – |" in result.stdout
    assert re.search(r"A: old \(revision [0-9a-f]{9}\)\. B: new \(revision [0-9a-f]{9}\)", result.stdout)
    claim = "| digits-table3, C7: Adding the GAN loss gives a large gain | undecided | **refuted** | undecided! | refuted! |"
    assert claim in result.stdout


def test_an_experiment_is_a_side(repository: Path) -> None:
    with chdir(repository):
        result = run("new", "tried")
        assert "1 better, 1 no difference shown" in result.stdout
        assert "- config `critic.ratio`: `10` → `20`" in result.stdout
        assert "| `dmd2` | 5.00 ± 0.50 | 5.00 ± 0.50 | equal | – |" in run("tried").stdout  # the workspace


def test_only_what_is_asked_for_is_copied(repository: Path, tmp_path: Path) -> None:
    with chdir(repository):
        side = open_side("old", tmp_path)
        assert len(side.matching("results/runs/digits/*/*/metrics.json")) == 6
        assert list(tmp_path.iterdir()) == []
        side.json("results/runs/digits/dmd2/seed1/metrics.json")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["metrics.json"]


def test_images_of_revisions_stand_side_by_side(repository: Path) -> None:
    with chdir(repository):
        assert run("old", "new", "--html", "page.html").exit_code == 0
        page = (repository / "page.html").read_text()
        Path("page.html").unlink()
    seen = Seen(page)
    assert len(seen.images) == 4 and all(image.startswith("data:image/png;base64,") for image in seen.images)
    assert seen.images[0] != seen.images[1] and seen.images[2] == seen.images[3]  # dmd2, ttur
    assert "training seed 0 in A, 3 in B: none is shared; the same noise in the same place." in seen.text
    assert "training seed 0; the same noise in the same place; the images are identical." in seen.text
    assert "A has seeds 0, 1, 2; B 3, 4, 5: unpaired, Welch interval" in seen.text
    assert "config critic.ratio: 5 → 10" in seen.text
    assert "script" not in seen.tags and not re.search(r"(src|href)=\"(?!data:)", page)


class Seen(HTMLParser):
    """Tags, image sources and text of a page whose tags are all closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_revision_whose_results_are_nowhere_is_named(repository: Path, tmp_path: Path, monkeypatch) -> None:
    clone = tmp_path / "clone"
    shell("git", "clone", "-q", str(repository), str(clone))
    monkeypatch.chdir(clone)
    result = run("old", "new")
    assert result.exit_code == 2
    assert re.match(r"error: results of old: neither in the DVC cache nor a remote \(.*\): run dvc push", result.stderr)


def test_a_file_missing_in_the_cache_is_named(repository: Path, tmp_path: Path, monkeypatch) -> None:
    copy = shutil.copytree(repository, tmp_path / "copy")
    monkeypatch.chdir(copy)
    metrics = Path("results/runs/digits/ttur/seed0/metrics.json").read_bytes()
    (stored,) = [p for p in Path(".dvc/cache").rglob("*") if p.is_file() and p.read_bytes() == metrics]
    stored.unlink()
    result = run("old", "new")
    assert result.exit_code == 2
    assert "ttur/seed0/metrics.json of old: neither in git, the DVC cache nor a remote: run dvc push" in result.stderr


def test_a_name_with_two_meanings_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMD2_WORKSPACE", str(repository))
    with chdir(repository):
        Path("old").mkdir()
        try:
            result = run("old", "new")
        finally:
            Path("old").rmdir()
    assert result.exit_code == 2
    assert result.stderr == "error: old is a folder and a git revision: write ./old or refs/heads/old\n"


@pytest.fixture
def tables(root: Path, tmp_path: Path) -> Iterator[Path]:
    """Folder `published` with nothing but a table of three seeds, beside the workspace that it is from."""
    fake_results.workplace(tmp_path, root)
    with chdir(tmp_path):
        shutil.copy2(fake_results.table("digits-table3"), Path("published").mkdir() or "published/")
        yield tmp_path


def test_of_a_folder_of_tables_numbers_and_configs_are_left(tables: Path) -> None:
    result = run("published")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"Rows on both sides: 8 no difference shown\.", result.stdout)
    assert result.stdout.count("| equal | – | no difference shown |") == 8
    assert "A has no sample grids." in result.stdout
    assert "No verdict on a claim changed in digits-table3." in result.stdout
    assert "config `" not in result.stdout


def test_a_table_of_other_numbers_than_its_runs_is_said(tables: Path) -> None:
    path = Path("results/runs/digits/dmd2/seed1/metrics.json")
    record = read_json(path)
    record["snapshots"][-1]["fd"] += 1
    write_json(path, record)
    said = "table digits-table3 of B, whose claims are compared, has other numbers than its evaluations (dmd2)"
    assert f"Warning: {said}: make it again." in run("published").stdout
    shutil.rmtree("results/runs/digits/ttur/seed1")
    assert "has seeds without an evaluation (ttur)" in run("published").stdout
    shutil.rmtree("results/runs/digits/ttur")
    result = run("published", "--fail-if-worse")
    assert (result.exit_code, result.stderr) == (1, "digits/ttur is gone: only A (published) has it\n")


def test_a_claim_that_only_one_side_judges_is_listed(tables: Path) -> None:
    table = build("digits-table3")
    table["claims"] = [claim for claim in table["claims"] if claim["id"] != "C9"]
    write_json(Path("results/tables/digits-table3.json"), table)
    write_json(Path("results/tables/other.json"), {**table, "name": "other", "rows": []})
    text = run("published").stdout
    assert re.search(r"\| digits-table3, C9: .* \| supported \| \*\*not judged\*\* \|", text)
    assert "Tables only in B, whose claims are not compared: other." in text


def test_of_a_table_published_without_configs_numbers_are_left_and_what_is_lost_is_said(tables: Path) -> None:
    table = read_json(Path("published/digits-table3.json"))
    kept = ("images", "detector", "reference")
    for row in table["rows"]:
        row["protocol"] = {key: row["protocol"][key] for key in kept} | {"snapshot": "last"}
        row |= {"config": {}, "curves": {}}
    for place in ("old", "new"):
        write_json(Path(place, "results/reference/digits-table3.json"), table)
    text = run("old", "new").stdout
    assert "8 no difference shown" in text
    assert "- the config of A and of B is not known: only a published table is left" in text
    assert "A has no sample grids." in text and "claim" not in text
    result = run("old", "published", "--fail-if-worse")
    assert result.exit_code == 0 and "config `" not in result.stdout
    assert "one side does not tell" in result.stdout
    for row in table["rows"]:  # by the classifier that another machine trained
        row["protocol"]["detector"] = "digits-classifier@00000000"
    write_json(Path("old/results/reference/digits-table3.json"), table)
    result = run("old", "published", "--fail-if-worse")
    assert "digits/dmd2 cannot be compared: measured by different protocols: detector is" in result.stderr
    assert "comparable with one data/weights/digits-classifier for both" in result.stderr
    assert re.search(
        r"\| row \| Brightness \| Brightness SD ↓ \|\n.*\n(\| `.*` \| equal \| (equal|–) \|\n){8}", result.stdout
    )
    shutil.copy2("published/digits-table3.json", Path("old/results/tables").mkdir() or "old/results/tables/")
    assert "8 no difference shown" in run("old", "published").stdout  # the newer table counts, not the published one


def test_the_published_tables_of_this_repository_are_a_side(root: Path) -> None:
    published = root / "results/reference"
    tables = {path.stem: read_json(path) for path in sorted(published.glob("*.json"))}
    rows = {(table["base"], row["run"]) for table in tables.values() for row in table["rows"]}
    result = run(str(published), str(published))
    assert result.exit_code == 0 and f"Rows on both sides: {len(rows)} no difference shown." in result.stdout
    assert f"No verdict on a claim changed in {', '.join(tables)}." in result.stdout
    assert "| `dmd` | 3.60 ± 0.27 | 3.60 ± 0.27 | equal |" in result.stdout


def test_a_sample_grid_that_is_no_image_is_said(tables: Path) -> None:
    Path("results/runs/digits/dmd2/seed0/grid.png").write_text("no image")
    result = run("workspace", "./results", "--html", "page.html")
    assert result.exit_code == 2 and "dmd2/seed0/grid.png cannot be read as an image" in result.stderr


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    place = tmp_path / "<b>"
    student(place, "dmd2", THREE)
    with Image.open(place / "results/runs/digits/dmd2/seed0/grid.png") as image:
        assert image.size == (80, 48)
    assert run(str(place), str(place), "--html", str(tmp_path / "page.html")).exit_code == 0
    assert "b" not in Seen((tmp_path / "page.html").read_text()).tags
