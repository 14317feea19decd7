"""Every row of the paper's tables trains, on a tiny network of the same parameterisation and conditioning."""

import pytest
import torch

from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import load_base, load_experiment
from dmd2.method.step import train_step
from tests import tiny
from tests.conftest import ROOT

EXPERIMENT = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base")
KINDS = {"imagenet64": "edm", "sdxl": "eps-sdxl"}
ROWS = [(table, row.run) for table in ("dmd2-table3", "dmd2-table4") for row in EXPERIMENT.rows[table]]
# What is on in each row of the paper: DM, GAN, regression, critic updates per student update.
PAPER = {
    "dmd": (True, False, True, 1), "no-regression": (True, False, False, 1), "ttur": (True, False, False, 5),
    "dmd2": (True, True, False, 5), "gan-only": (False, True, False, 1), "gan-only-ttur": (False, True, False, 5),
    "4step-no-gan": (True, False, False, 5), "4step-no-dm": (False, True, False, 5),
    "4step-no-backsim": (True, True, False, 5), "4step": (True, True, False, 5),
}  # fmt: skip


def row_config(table, run):
    return EXPERIMENT.runs[EXPERIMENT.tables[table].base, run]


def shrunk(cfg, kind):
    """The row's own switches on tiny data."""
    values, small = cfg.model_dump(), tiny.values(kind)
    values["data"], values["optim"] = small["data"], {**values["optim"], "batch": 4}
    values["teacher"] = {**values["teacher"], "network": None, "train": None}
    values["train"]["precision"] = "fp32"
    values["regression"]["distance"] = "l2"
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(("table", "run"), ROWS)
def test_row_trains_for_a_few_iterations(table, run):
    cfg = row_config(table, run)
    kind = KINDS[EXPERIMENT.tables[table].base]
    cfg = shrunk(cfg, kind)
    m, b = tiny.models(kind, cfg), tiny.batches(kind, cfg)
    before = tiny.weights(m.student), tiny.weights(m.critic)
    for it in range(cfg.critic.ratio + 1):
        logs = train_step(m, b.at(it), it, cfg)
        assert all(torch.isfinite(value) for value in logs.values())
    assert not tiny.same(before[0], m.student)
    assert not tiny.same(before[1], m.critic)


@pytest.mark.parametrize(("table", "run"), ROWS)
def test_row_evaluates_exactly_the_terms_of_the_paper(table, run):
    kind = KINDS[EXPERIMENT.tables[table].base]
    cfg = shrunk(row_config(table, run), kind)
    logs = train_step(tiny.models(kind, cfg), tiny.batches(kind, cfg).at(0), 0, cfg)
    dm, gan, regression, ratio = PAPER[run]
    assert ("student/dm" in logs, "student/gan" in logs, "critic/gan" in logs) == (dm, gan, gan)
    assert ("student/regression" in logs, cfg.critic.ratio) == (regression, ratio)
    assert "critic/denoise" in logs  # L_K stays on in every row, GAN-only included (5.1)


@pytest.mark.parametrize(("table", "run"), ROWS)
def test_row_has_the_published_settings_of_its_base(table, run):
    cfg = row_config(table, run)
    batch, lr, guidance, lambda_g, world = {
        "imagenet64": (280, 2e-6, 1.0, 3e-3, 7), "sdxl": (128, 5e-7, 8.0, 5e-3, 64),
    }[EXPERIMENT.tables[table].base]  # fmt: skip
    assert (cfg.optim.batch, cfg.optim.lr, cfg.teacher.guidance) == (batch, lr, guidance)
    assert (cfg.optim.warmup, cfg.optim.ticks_per_iteration, cfg.optim.clip) == (500, world, 10)
    assert (cfg.optim.weight_decay, cfg.optim.betas, cfg.optim.ema) == (0.01, (0.9, 0.999), None)
    assert cfg.dm.index_range == (20, 980)
    if cfg.gan.on:
        assert (cfg.gan.lambda_g, cfg.gan.lambda_d, cfg.gan.noise_range) == (lambda_g, 1e-2, (0, 999))
        assert cfg.gan.features_from == "critic"


def test_dmd_row_has_the_regression_of_the_dmd_paper():
    regression = row_config("dmd2-table3", "dmd").regression
    assert (regression.weight, regression.distance, regression.pairs.count) == (0.25, "lpips", 25000)
    assert (regression.pairs.sampler.solver, regression.pairs.sampler.steps, regression.pairs.sampler.churn) == (
        "heun",
        256,
        0,
    )


def test_sdxl_rows_differ_in_the_student_input_alone_where_the_paper_says_so():
    inputs = {run: row_config("dmd2-table4", run).generator for _, run in ROWS if run.startswith("4step")}
    assert {run: g.input for run, g in inputs.items() if g.input != "backward_simulation"} == {
        "4step-no-backsim": "noised_real"
    }
    assert {(g.steps, g.time) for g in inputs.values()} == {(4, 999)}


def test_sd15_base_has_the_published_second_stage():
    cfg = load_base("sd15", ROOT / "workflow/base")
    assert (cfg.optim.lr, cfg.optim.batch, cfg.critic.ratio, cfg.teacher.guidance) == (5e-7, 2048, 10, 1.75)
    assert (cfg.gan.lambda_g, cfg.gan.lambda_d, cfg.generator.time) == (1e-3, 1e-2, 999)


@pytest.mark.parametrize("kind", ["edm", "eps-sdxl"])
def test_four_noised_real_or_simulated_steps_train_on_either_parameterisation(kind):
    for mode in ("noised_real", "backward_simulation"):
        cfg = tiny.config(kind, generator={"input": mode, "steps": 4, "time": 80.0 if kind == "edm" else 999.0})
        m, b = tiny.models(kind, cfg), tiny.batches(kind, cfg)
        for it in range(6):
            assert all(torch.isfinite(value) for value in train_step(m, b.at(it), it, cfg).values())
