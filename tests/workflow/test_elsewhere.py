"""The workflow in a folder of the user's own, with the Snakefile and the packages elsewhere."""

from pathlib import Path

import pytest

from dmd2.experiment.cluster import import_environment, load_cluster
from dmd2.experiment.tables import load_base, load_experiment
from dmd2.experiment.yaml_file import CODE, ORIGIN
from tests.conftest import ROOT
from tests.workspace import Workspace

SNAKEFILE = str(ROOT / "workflow/Snakefile")
TABLE = 'title: "mine"\nbase: digits\nrows:\n- {run: dmd2}\n- {run: half, change: {critic.ratio: 2}}\n'


@pytest.fixture
def own(tmp_path: Path) -> Workspace:
    """An empty folder with one table, and files called as the packages are."""
    (tmp_path / "workflow/tables").mkdir(parents=True)
    (tmp_path / "workflow/tables/mine.yaml").write_text(TABLE)
    for name in ("eval.py", "dmd2.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')\n")
    return Workspace(tmp_path)


def test_the_current_folder_is_the_workspace(own: Workspace) -> None:
    planned = own.run("snakemake", "--snakefile", SNAKEFILE, "-n", "mine")  # by the default profile
    assert planned.returncode == 0, planned.stderr
    assert "half" in planned.stdout + planned.stderr and "ttur" not in planned.stdout + planned.stderr
    made = own.run("snakemake", "--snakefile", SNAKEFILE, "data/real/digits/manifest.json")
    assert made.returncode == 0, made.stderr
    assert (own.path / "data/real/digits/manifest.json").exists()


def test_own_files_come_before_those_beside_the_snakefile(own: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.path)
    assert load_experiment().tables["mine"].title == "mine"
    assert "digits-table3" in load_experiment().tables and load_base("digits") == load_experiment().bases["digits"]
    (own.path / "workflow/tables/digits-table3.yaml").write_text(TABLE)
    assert load_experiment().tables["digits-table3"].title == "mine"
    shipped = (ROOT / "workflow/cluster/slurm.yaml").read_text()
    (own.path / "workflow/cluster").mkdir()
    (own.path / "workflow/cluster/slurm.yaml").write_text(shipped.replace("runtime: 240", "runtime: 30"))
    assert load_cluster("slurm") != load_cluster("slurm", ROOT / "workflow/cluster")
    assert load_cluster("local") == load_cluster("local", ROOT / "workflow/cluster")


def test_jobs_import_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/elsewhere:{ROOT}")
    assert ORIGIN == CODE == ROOT
    assert import_environment() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}:/elsewhere"}
