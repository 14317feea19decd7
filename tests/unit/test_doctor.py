"""`dmd2 doctor`: one line for what is here or not, one sentence for what a table lacks, and no waiting for a driver."""

import shutil
from pathlib import Path

import pytest

import dmd2.command.doctor as module
from dmd2.command.needs import lacks
from dmd2.experiment.tables import load_experiment


@pytest.fixture
def place(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the real tables, and a machine without GPU."""
    shutil.copytree(root / "workflow", tmp_path / "workflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "GPUS", "")
    return tmp_path


def said(capsys) -> dict[str, str]:
    """The first words of each line, and the rest."""
    module.doctor()
    lines = capsys.readouterr().out.splitlines()
    return {
        line[:20].strip() if line[:8].strip() in ("ok", "missing") else line.split(":")[0]: line[20:] for line in lines
    }


def test_each_line_says_what_is_here_and_the_last_ones_which_tables_can_be_made(place: Path, capsys) -> None:
    found = said(capsys)
    assert str(place) in found["ok      workspace"] and "torch 2." in found["ok      packages"]
    assert found["missing GPU"].startswith("PyTorch sees none")
    assert "digits-table3" in found["can be made here"]
    assert "imagenet64_lmdb" in found["dmd2-table3"]


def test_a_gpu_is_named_and_a_driver_that_hangs_is_left(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(module, "GPUS", "print('NVIDIA H200, 140 GiB')")
    found = said(capsys)
    assert found["ok      GPU"] == "NVIDIA H200, 140 GiB" and "a GPU" not in found["dmd2-table3"]
    monkeypatch.setattr(module, "GPUS", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    assert "the driver did not answer" in said(capsys)["missing GPU"]
    monkeypatch.setattr(module, "PATIENCE", 60)
    monkeypatch.setattr(module, "GPUS", "raise ImportError('libcudart.so')")
    assert said(capsys)["missing GPU"] == "PyTorch cannot be imported: ImportError: libcudart.so"


def test_a_broken_table_is_a_sentence(place: Path, capsys) -> None:
    (place / "workflow/tables/demo.yaml").write_text("title: [")
    module.doctor()
    assert "\nnot readable: workflow/tables/demo.yaml" in capsys.readouterr().out


def test_what_a_table_lacks_goes_as_it_comes(place: Path) -> None:
    experiment = load_experiment()
    assert lacks(experiment, "digits-table3", gpu=False) == []
    needs = ["data/raw/edm-cifar10-32x32-cond-vp.pkl", "weights lpips-vgg16", "weights inception-2015-12-05",
             "data/refs/cifar10-edm.npz", "data/raw/cifar10"]  # fmt: skip
    assert lacks(experiment, "cifar10-table3", gpu=True) == needs
    assert lacks(experiment, "cifar10-table3", gpu=False) == ["a GPU", *needs]
    for name in (*needs[0::3], "data/weights/lpips-vgg16/vgg16-397923af.pth", "data/raw/cifar10/batches"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert lacks(experiment, "cifar10-table3", gpu=True) == needs[1:3]  # LPIPS has a second file
    Path("data/weights/lpips-vgg16/lpips_weights.pt").touch()
    assert lacks(experiment, "cifar10-table3", gpu=True) == needs[2:3]


def test_a_pipeline_that_is_not_there_is_named_once(place: Path) -> None:
    found = lacks(load_experiment(), "dmd2-table4", gpu=True)
    assert "data/pipelines/sdxl" in found and "data/pipelines/sdxl/unet" not in found
    assert "weights clip-ViT-g-14" in found and "data/raw/coco10k_captions.txt" in found
