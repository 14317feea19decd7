"""Push, clone, restore: nothing is to do; what changed is done; what is damaged is named. Real git and real DVC."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.workflow.versioned import RUN, call, clone, recorded, restore, save, stored
from tests.workspace import Workspace

OTHER_WEIGHT = ("workflow/tables/demo.yaml", "regression.weight: 5.0", "regression.weight: 4.0")


@pytest.fixture(scope="module")
def pushed(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The recorded workspace, pushed to a directory and to S3."""
    folder, server = tmp_path_factory.mktemp("versions"), ThreadedMotoServer(port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="results")
        workspace = recorded(finished, folder / "origin")
        call(workspace, "dvc", "remote", "add", "-d", "store", str(folder / "store"))
        call(workspace, "dvc", "remote", "add", "bucket", "s3://results/dmd2")
        call(workspace, "dvc", "remote", "modify", "bucket", "endpointurl", endpoint)
        save(workspace, "remotes")
        for remote in ("store", "bucket"):
            call(workspace, "dvc", "push", "-r", remote)
        yield workspace
    server.stop()


@pytest.fixture
def fresh(pushed: Workspace, tmp_path: Path) -> Workspace:
    return clone(pushed, tmp_path / "clone")


def damage(path: Path) -> None:
    """Change one digit or the last byte of a file that DVC has made read-only."""
    raw = bytearray(path.read_bytes())
    if path.read_bytes().startswith(b"{"):
        raw[raw.index(b".", raw.index(b'"fd": ')) + 1] ^= 1
    else:
        raw[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)


@pytest.mark.parametrize("remote", ["store", "bucket"])
def test_nothing_is_to_do_after_clone_and_restore(fresh: Workspace, remote: str) -> None:
    status, said = restore(fresh, "--remote", remote)
    assert status == 0 and "files are what dvc.lock and their manifests say" in said
    assert fresh.planned("demo") == {}
    assert "up to date" in call(fresh, "dvc", "status")


def test_only_what_a_finished_result_needs_is_versioned(pushed: Workspace, fresh: Workspace) -> None:
    assert restore(fresh)[0] == 0
    there, here = ({p.relative_to(w.path) for p in (w.path / RUN).rglob("*") if p.is_file()} for w in (pushed, fresh))
    assert {path.name for path in here if path.parent == Path(RUN)} == {
        "train.json", "finished.json", "metrics.json", "influence.safetensors", "log.jsonl", "grid.png",
    }  # fmt: skip
    left = {path for path in there - here if path.parent == Path(RUN)} | {p.parent for p in there - here}
    assert any("checkpoints-" in str(path) for path in left) and not any("snapshots-" in str(path) for path in left)


def test_changed_value_after_a_restore_runs_exactly_its_jobs(fresh: Workspace) -> None:
    assert restore(fresh)[0] == 0
    fresh.edit(*OTHER_WEIGHT)
    assert fresh.planned("demo") == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1, "train": 1}


def test_repro_after_a_change_records_the_new_result_and_shows_the_difference(fresh: Workspace) -> None:
    assert restore(fresh)[0] == 0
    fresh.edit(*OTHER_WEIGHT)
    assert "row_change.dmd.regression.weight" in call(fresh, "dvc", "params", "diff")
    call(fresh, "dvc", "repro")
    train = json.loads((fresh.path / "results/runs/digits/dmd/seed0/train.json").read_text())
    assert train["config"]["regression"]["weight"] == 4.0
    assert "up to date" in call(fresh, "dvc", "status") and fresh.planned("demo") == {}
    shown = call(fresh, "dvc", "metrics", "show").splitlines()
    assert shown[0].split()[:2] == ["Path", "accuracy"] and len(shown) == 5, shown  # a line for each row
    changed = json.loads(call(fresh, "dvc", "metrics", "diff", "--json"))
    assert set(changed) == {"results/tables/metrics/demo/dmd.yaml"}
    assert changed["results/tables/metrics/demo/dmd.yaml"]["fd"]["diff"] != 0
    call(fresh, "dvc", "plots", "diff", "-o", "plots")
    page = (fresh.path / "plots/index.html").read_text()
    assert all(f'"rev": "{rev}"' in page for rev in ("HEAD", "workspace")) and '"field": "run"' in page


def test_damaged_files_of_a_remote_are_named_and_not_used(pushed: Workspace, fresh: Workspace, tmp_path: Path) -> None:
    remote = tmp_path / "store"
    shutil.copytree(pushed.path.parent / "store", remote)
    snapshot = next((pushed.path / RUN).glob("snapshots-*/0000020.safetensors")).relative_to(pushed.path)
    for path in (f"{RUN}/metrics.json", str(snapshot)):
        damage(stored(pushed, remote, path))
    call(fresh, "dvc", "remote", "modify", "store", "url", str(remote))
    status, said = restore(fresh)
    assert status == 1 and said.count("error: ") == 2
    for path in (f"{RUN}/metrics.json", str(snapshot)):
        assert f"{path} is not what dvc.lock lists" in said
    assert "the remote holds it damaged" in said and ".dvc/cache/files/md5/" in said
    assert "up to date" in call(fresh, "dvc", "status"), "DVC finds it itself now: simplify dmd2/publish/restore.py"
    result = fresh.snakemake(f"{RUN}/metrics.json")
    assert f"{RUN}/metrics.json was changed after it was made" in result.stderr
    assert result.returncode != 0 and "0000020.safetensors does not match the checksum" in result.stdout + result.stderr


def test_file_damaged_after_the_pull_is_named_and_comes_back(fresh: Workspace) -> None:
    assert restore(fresh)[0] == 0
    path = fresh.path / RUN / "log.jsonl"
    path.write_text(path.read_text()[:-20])
    status, said = restore(fresh, "--check")
    assert status == 1 and f"{RUN}/log.jsonl is not what dvc.lock lists" in said and ".dvc/cache" not in said
    path.unlink()
    assert restore(fresh)[0] == 0


def test_part_of_the_results_can_be_restored_and_knows_when_it_is_outdated(fresh: Workspace) -> None:
    status, said = restore(fresh, "tables", "report")
    assert status == 0, said
    assert not (fresh.path / RUN).exists() and fresh.planned("demo") == {}
    fresh.edit("workflow/base/digits.yaml", "weight_decay: 0.01", "weight_decay: 0.02")
    assert fresh.planned("demo")["train"] == 2


def test_checkpoints_survive_a_checkout_of_other_results(pushed: Workspace, tmp_path: Path) -> None:
    shutil.copytree(pushed.path, tmp_path / "copy", symlinks=True)
    copy = Workspace(tmp_path / "copy")
    checkpoints = {path.relative_to(copy.path) for path in (copy.path / "results").rglob("checkpoints-*/*")}
    run = copy.path / "results/runs/digits/new/seed0"
    (run / "checkpoints-00000000").mkdir(parents=True)
    for name in ("train.json", "checkpoints-00000000/00000020.pt", "progress.json"):
        (run / name).write_text("{}")
    call(copy, "dvc", "commit", "-f", "runs")
    assert checkpoints and "digits/new" not in call(copy, "git", "status", "--short")
    call(copy, "git", "checkout", "-q", "dvc.lock")
    call(copy, "dvc", "checkout", "runs")
    left = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert left == {Path("checkpoints-00000000/00000020.pt"), Path("progress.json")}
    assert all((copy.path / path).exists() for path in checkpoints)
