"""The command lines of the README of release 0.1 still work; `dmd2` is a second name of most of them."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fork_server import REPO, quick_bin

COMMANDS = """
dmd2.convert FILE FOLDER --base data/pipelines/sdxl/unet
dmd2.convert data/teachers/edm-imagenet64/unet --to-edm edm-imagenet64.safetensors
dmd2.convert edm-imagenet-64x64-cond-adm.pkl data/teachers/edm-imagenet64/unet
dmd2.launch cancel digits/dmd2/seed0
dmd2.launch logs digits/dmd2/seed0
dmd2.launch print digits/dmd2/seed0
dmd2.launch status digits-table3
dmd2.launch train digits/dmd2/seed0 --again
dmd2.planning imagenet64
dmd2.planning imagenet64 --table dmd2-table3 --gpus 8 --gpu-memory 40
dmd2.planning imagenet64 --run dmd2 --cluster slurm
dmd2.planning sdxl --gpus 8 --shard --checkpointing
dmd2.publish.export digits/dmd2/seed0 exported/digits-dmd2 --teacher-licence apache-2.0
dmd2.publish.restore
eval paired samples-a/ samples-b/ reference/ --detector lite0-320@64 --metrics fd
eval protocols
eval score samples/ --metrics clip-score --prompts prompts.txt --clip data/weights/clip-ViT-g-14
eval score samples/ reference/ --detector lite0-320@64 --metrics fd,kid,prdc --json score.json
eval stats reference/ refs/coco/manifest.json --detector lite0-320@64
eval.catalogue --csv results/catalogue.csv --logs results/catalogue-logs.parquet
eval.catalogue --schema
eval.compare main
eval.detectors.weights lpips-vgg16
""".strip().splitlines()
BENCHMARKS = ("data", "evaluation", "full_size", "restore", "sweep")
LOCAL = ["demo", "digits", "digits-table3", "fashion-tiny-table3", "prune"]
SLURM = ["digits-table3", "dmd2-table4"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy: the module was imported by another test
@pytest.mark.parametrize("line", COMMANDS)
def test_a_module_takes_the_options_it_took(line: str, monkeypatch, capsys) -> None:
    module, *words = line.split()
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])  # options are parsed first; an unknown one ends with 2
    with pytest.raises(SystemExit) as ending:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ending.value.code == 0 and "Usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("profile", "targets"), [("local", LOCAL), ("slurm", SLURM)])
def test_snakemake_plans_the_targets(profile: str, targets: list[str]) -> None:
    line = ["snakemake", "--profile", profile, "-n", *targets]
    env = {"PATH": f"{quick_bin()}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/tmp"}
    done = subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_and_the_benchmarks_have_their_names() -> None:
    rules = (REPO / "Makefile").read_text()
    assert all(f"\n{target}:" in rules for target in ("demo", "test", "test-gpu"))
    assert all(find_spec(f"benchmarks.{name}") for name in BENCHMARKS)
