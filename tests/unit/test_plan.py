"""What a user reads before submitting: GPUs, hours and bytes that follow from the counts, and sentences for mistakes."""

import json
import os

import pytest
import torch
import typer
from typer.testing import CliRunner

import dmd2.planning.plan
from dmd2.data.sets import load_shard
from dmd2.experiment.cluster import Cluster
from dmd2.experiment.tables import load_base, load_experiment
from dmd2.method.step import train_step
from dmd2.planning import plan, rates
from dmd2.planning.__main__ import main
from dmd2.planning.memory import Counted, Memory
from dmd2.planning.page import GIB, MB, available, fit, plan_page
from dmd2.planning.plan import (
    KEPT,
    Plan,
    TablePlan,
    copied_bytes,
    counting,
    disk_of,
    host_memory,
    requested_memory,
    snapshots,
)
from dmd2.planning.rates import Rate
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.pairs import make_shard
from tests import tiny
from tests.conftest import ROOT
from tests.unit.test_memory import config

LAW = Memory({}, gradients=GIB, points=((1, 11 * GIB), (2, 12 * GIB)))  # 10 GiB and one for each image


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Run the command in a folder with one small base, a table of it, and nothing else."""
    values = tiny.values("edm")
    values["teacher"]["network"] = tiny.KINDS["edm"][2]
    (tmp_path / "workflow/base").mkdir(parents=True)
    (tmp_path / "workflow/tables").mkdir()
    (tmp_path / "workflow/base/tiny.yaml").write_text(json.dumps(values))
    rows = [{"run": "full"}, {"run": "dmd", "change": {"regression.weight": 1.0, "critic.ratio": 1}}]
    table = {"title": "t", "base": "tiny", "rows": rows, "seeds": [0, 1]}
    (tmp_path / "workflow/tables/both.yaml").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(main)

    def run(*args):
        result = CliRunner().invoke(app, list(args))
        return result.exit_code, result.output + str(result.exception or "")

    return run


def test_the_page_names_the_source_of_its_numbers(page):
    code, text = page("both", "--gpus", "2")
    assert code == 0, text
    assert text.count("(computed)") == 4  # memory, arithmetic, disk, host memory
    assert "assumed: an A100 at 20% of its 312 TFLOP/s" in text
    assert "2 GPUs, 2 images each" in text
    assert "Table both: 2 rows x 2 seeds" in text


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["tin"], "there is no base or table tin, did you mean tiny?"),
        (["tiny", "--run", "fulll"], "no table has the run tiny/fulll, did you mean full?"),
        (["tiny/fulll"], "no table has the run tiny/fulll, did you mean full?"),
        (["bothh"], "there is no base or table bothh, did you mean both?"),
        (["tiny", "--table", "bot"], "there is no table bot, did you mean both?"),
        (["tiny", "--gpus", "9"], "9 processes cannot share a batch of 4"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_page(page, args, sentence):
    code, text = page(*args)
    assert code == 1 and sentence in text
    assert "Memory" not in text


def test_a_table_of_another_base_is_refused(page, tmp_path):
    base = (tmp_path / "workflow/base/tiny.yaml").read_text()
    (tmp_path / "workflow/base/other.yaml").write_text(base)
    code, text = page("other", "--table", "both")
    assert code == 1 and "table both is of base tiny, not other" in text


def test_what_fits_into_a_gpu():
    card = 30 / 0.9 + 2  # GiB, of which the reserve leaves 30
    assert available(card) == pytest.approx(30 * GIB)
    assert fit(LAW, card + 1e-6, 100, 4) == [
        f"{card:g} GiB", "30.00 GiB", "19", "5", "2 passes, micro_batch 19: 30.00 GiB",
    ]  # fmt: skip
    assert fit(LAW, card + 1e-6, 100, 5)[4] == "one pass: 30.00 GiB"
    assert fit(LAW, card + 1e-6, 100, 5, micro_batch=7)[4] == "3 passes, micro_batch 7: 18.00 GiB"


def test_a_gpu_that_is_too_small_is_told_by_how_much():
    cells = fit(LAW, 10 / 0.9 + 2, 100, 4)
    assert cells[2:4] == ["0", "none"]
    assert cells[4] == "25 passes, micro_batch 1: does not fit, 2.00 GiB more is needed"
    assert "does not fit, 3.00 GiB more is needed" in fit(LAW, 20 / 0.9 + 2, 100, 4, micro_batch=12)[4]


def test_the_published_hours_come_out_of_the_published_runs():
    runs = load_experiment().runs

    def flops(cfg):
        return (5.0 if cfg.gan.on else 3.0) + 4.0 / cfg.critic.ratio

    def hours(row):
        cfg = runs["imagenet64", row]
        rate = rates.rate_of("imagenet64", row, cfg, flops)
        assert rate.kind == "published"
        return rate.hours(flops(cfg) * cfg.optim.batch) * 1000

    assert hours("dmd2") == pytest.approx(7 * 53 / 200)  # per thousand iterations
    assert hours("ttur") == pytest.approx(7 * 70 / 410)
    assert hours("no-regression") == pytest.approx(7 * 70 / 410 * (3 + 4) / (3 + 4 / 5))


def record(cfg, seconds, device="NVIDIA A100-SXM4-80GB"):
    return {"config": cfg.training().model_dump(mode="json"), "seconds": seconds, "steps": 20, "processes": 2,
            "threads": 1, "device": device}  # fmt: skip


def written(folder, run, value, clock):
    path = folder / "results/runs" / run / "train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(value))
    os.utime(path, (clock, clock))


def test_a_measured_rate_wins_over_a_published_one_and_the_same_row_over_a_newer_one(tmp_path, monkeypatch):
    cfg = config()
    other = config(gan__lambda_g=0.0, gan__lambda_d=0.0)
    monkeypatch.setattr(rates, "RUNS", tmp_path / "results/runs")
    counted = counting()

    def flops(cfg):
        return counted(cfg).image_flops

    assert rates.rate_of("tiny", "dmd2", cfg, flops).kind == "assumed"
    written(tmp_path, "tiny/no-gan/seed0", record(other, 40.0), clock=2000)
    rate = rates.rate_of("tiny", "dmd2", cfg, flops)
    assert rate.kind == "measured" and "tiny/no-gan/seed0, 2 s per iteration on 2 x NVIDIA A100" in rate.source
    assert rate.flops == pytest.approx(counted(other).image_flops * 4 / 2 / 2)
    written(tmp_path, "tiny/dmd2/seed0", record(cfg, 60.0), clock=1000)
    planned = Plan.of("tiny", "dmd2", cfg, counted)
    assert "tiny/dmd2/seed0, 3 s per iteration" in planned.rate.source
    assert planned.hours()["training"] == pytest.approx(2 * 3 * cfg.train.steps / 3600)
    written(tmp_path, "tiny/dmd2/seed1", record(cfg, 80.0, "cpu"), clock=3000)
    rate = rates.rate_of("tiny", "dmd2", cfg, flops)
    assert rate.unit == "CPU" and rate.source.endswith("on 2 x cpu with 1 thread")
    released = {**record(cfg, 0.0), "seconds": None}  # was not trained here, so it says nothing about speed
    written(tmp_path, "tiny/dmd2/seed2", released, clock=4000)
    assert rates.rate_of("tiny", "dmd2", cfg, flops) == rate


def test_a_given_rate_is_that_of_all_gpus_together():
    counted, cfg = counting(), config()
    rate = rates.given(0.5, 8, counted(cfg).image_flops * cfg.optim.batch)
    assert Plan.of("tiny", "dmd2", cfg, counted, rate).hours()["training"] == pytest.approx(
        8 * 0.5 * cfg.train.steps / 3600
    )


def test_sampling_costs_its_network_calls():
    cfg = config(eval__images=10, train__steps=25, regression__weight=1.0)
    planned = Plan("r", cfg, Counted(cfg), Rate(3600.0, "GPU", "given"))
    forward, hours = planned.counted.forward_flops / 3600 / 3600, planned.hours()
    assert hours["snapshots' images"] == pytest.approx(3 * 10 * forward)  # snapshots of steps 10, 20 and 25
    assert hours["teacher's images"] == pytest.approx(10 * 7 * forward)
    assert hours["pairs"] == pytest.approx(16 * 7 * forward)


def test_a_table_makes_its_shared_work_once():
    full, pairs = config(), config(regression__weight=1.0)
    rate, counted = Rate(1.0, "GPU", "given"), counting()
    rows = [Plan(name, cfg, counted(cfg), rate) for name, cfg in [("a", full), ("b", pairs), ("c", pairs)]]
    hours, each = TablePlan("t", 3, rows).hours(), [row.hours() for row in rows]
    assert each[0]["pairs"] == 0 < each[1]["pairs"]
    assert hours["training"] == pytest.approx(3 * sum(row["training"] for row in each))
    assert hours["snapshots' images"] == pytest.approx(9 * each[0]["snapshots' images"])
    assert hours["pairs"] == pytest.approx(each[1]["pairs"])
    assert hours["teacher's images"] == pytest.approx(each[0]["teacher's images"])
    disks = [row.disk for row in rows]
    expected = 3 * sum(disk.snapshots + KEPT * disk.checkpoint for disk in disks) + disks[1].pairs
    assert TablePlan("t", 3, rows).bytes() == expected


def leaves(value):
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("changes", [{}, {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}])
def test_a_checkpoint_is_as_large_as_its_tensors(changes):
    cfg = config(**changes)
    models = tiny.models("edm", cfg)
    train_step(models, tiny.batches("edm", cfg).at(0), 0, cfg)
    parts = (models.student, models.critic, models.head, models.student_optimiser, models.critic_optimiser)
    tensors = leaves([part.state_dict() for part in parts if part is not None])
    size = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    assert disk_of(cfg, Counted(cfg)).checkpoint == pytest.approx(size, rel=0.01)


def test_pairs_and_features_are_as_large_as_they_are_written(tmp_path):
    tiny.network("edm", seed=5).save_pretrained(tmp_path / "unet")
    cfg = config(regression__weight=1.0, eval__detector="lite0-320@32")
    make_shard(cfg, adopt_teacher(cfg.teacher, tmp_path), 0, tmp_path / "shard.json")
    disk = disk_of(cfg, Counted(cfg))
    assert disk.pairs == sum(t.nbytes for t in load_shard(tmp_path / "shard.safetensors").values())
    assert disk.features == 2 * 8 * 320 * 4
    assert disk_of(config(), Counted(config())).pairs == 0


def test_the_ema_is_in_the_checkpoint_without_moments():
    cfg, averaged = config(), config(optim__ema=0.9)
    plain, more = (disk_of(c, Counted(c)).checkpoint for c in (cfg, averaged))
    assert more - plain == 4 * Counted(cfg).parameters["student"]


def test_imagenet64_on_paper():
    cfg = load_base("imagenet64")
    disk = disk_of(cfg, Counted(cfg))
    assert snapshots(cfg) == 20
    assert disk.snapshots == 20 * 4 * 295_899_267
    assert disk.real == 1_281_167 * (3 * 64 * 64 + 8)


# What does not fit, text sets, and the memory of the host.
KINDS = ("real_data", "encode", "detector", "reference", "teacher", "pairs", "evaluate")


def cluster(train, **training):
    return Cluster.model_validate({"launcher": "local", "jobs": {**{kind: {} for kind in KINDS}, "train": train},
                                   "training": training})  # fmt: skip


@pytest.mark.parametrize(("card", "code", "words"), [(None, 0, []), ("80", 0, ["on 80 GiB", "fits"]),
                                                     ("2", 1, ["on 2 GiB", "DOES NOT FIT", "full, dmd of table both does not fit"])])  # fmt: skip
def test_a_row_that_does_not_fit_is_marked_by_a_word_and_by_the_exit(page, card, code, words):
    found, text = page("both", *([] if card is None else ["--gpu-memory", card]))
    assert found == code, text
    assert all(word in " ".join(text.split()) for word in words)


def test_text_sets_are_priced_as_float16_with_their_text_states(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no set is
    cfg = load_base("sdxl", ROOT / "workflow/base")
    monkeypatch.setattr(plan, "PUBLISHED_IMAGES", {cfg.data.name: 10, config().data.name: 10})
    weighted = cfg.model_copy(update={"regression": cfg.regression.model_copy(update={"weight": 1.0})})
    disk, text = disk_of(weighted, Counted(weighted)), 77 * 2048 * 2 + 1280 * 2 + 6 * 4
    assert disk.real == 10 * (4 * 128 * 128 * 2 + text)
    assert disk.pairs == cfg.regression.pairs.count * (2 * 4 * 4 * 128 * 128 + text)
    assert disk_of(config(), Counted(config())).real == 10 * (tiny.SIZE**2 + 8)


def told(planned, machine):
    return plan_page("tiny", planned, 1, (), 0, ("slurm", machine))


def test_host_memory_of_a_node_of_gpus_is_that_of_its_processes_a_snapshot_and_a_copy():
    planned = Plan("r", config(), Counted(config()), Rate(1.0, "GPU", "given"))
    found = host_memory(planned.counted, cluster({"gpu": 8}), peak=10**15)
    copied = copied_bytes(planned.counted, on_gpu=True)
    assert found == (8 * 3 * 2**30, 4 * planned.counted.parameters["student"] + copied)
    small, enough = -(-sum(found) // MB) - 1, -(-sum(found) // MB)
    assert f"jobs.train asks for {small} MB of memory of a node; set mem_mb to {enough}" in told(
        planned, cluster({"gpu": 8, "mem_mb": small})
    )
    for machine in (cluster({"gpu": 8, "mem_mb": enough}), cluster({"gpu": 8})):
        assert "Too small" not in told(planned, machine)
    assert requested_memory(cluster({"gpu": 8, "threads": 2, "mem_mb_per_cpu": 1000})) == 16000


def test_host_memory_on_cpus_and_of_split_networks():
    counted = Counted(config())
    assert host_memory(counted, cluster({}), peak=5e9)[0] == 2**30 + 5e9
    _, split = host_memory(counted, cluster({"gpu": 4}, shard=True, nodes=2), 0)
    state = 4 * sum(counted.parameters[name] for name in ("student", "critic", "head")) + counted.moments
    assert split == -(-state // 2)


def test_the_copy_of_a_checkpoint_is_what_is_saved_in_powers_of_two_of_a_gpu_and_not_made_of_a_huge_one(monkeypatch):
    counted = Counted(config())
    weights = sum(p.nbytes for name in ("student", "critic", "head") for p in counted.modules[name].parameters())
    exact = weights + sum(moment.nbytes for moment in counted.states)
    assert copied_bytes(counted, on_gpu=False) == exact < copied_bytes(counted, on_gpu=True) < 2 * exact
    monkeypatch.setattr(dmd2.planning.plan, "LARGEST", exact - 1)
    assert copied_bytes(counted, on_gpu=True) == 0


def test_the_page_marks_the_memory_of_the_cluster_file(page, tmp_path):
    (tmp_path / "workflow/cluster").mkdir()
    jobs = {**{kind: {} for kind in KINDS}, "train": {"gpu": 8, "mem_mb": 1000}}
    (tmp_path / "workflow/cluster/slurm.yaml").write_text(json.dumps({"launcher": "local", "jobs": jobs}))
    code, text = page("tiny")
    assert code == 0 and "asks for 1000 MB" in " ".join(text.split())
    assert "there is no cluster workflow/cluster/mine.yaml" in " ".join(page("tiny", "--cluster", "mine")[1].split())
