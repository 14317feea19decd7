"""Validation of a run's settings, and the digest that names its checkpoints."""

import pytest
from pydantic import ValidationError

from dmd2.experiment import section
from dmd2.experiment.checks.sections import problems
from dmd2.experiment.config import RunConfig, TrainConfig, digest
from dmd2.experiment.dotted_keys import leaves
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.method_config import Pairs
from dmd2.experiment.tables import load_base
from tests import tiny
from tests.conftest import ROOT

OUTSIDE = {"train.steps", "train.snapshot_every", "train.checkpoint_every", "train.log_every"}


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "-other"
    return [*value, 7] if isinstance(value, list | tuple) else "something"


def with_leaf(section, name, *below):
    """The config with one leaf changed, not validated: what matters is whether the digest sees it."""
    value = section[name] if isinstance(section, dict) else getattr(section, name)
    new = {name: with_leaf(value, *below) if below else changed(value)}
    return {**section, **new} if isinstance(section, dict) else section.model_copy(update=new)


FULL = tiny.config("edm", regression__weight=0.25)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("key", leaves(FULL.model_dump()))
def test_digest_changes_with_all_but_length_intervals_and_evaluation(key):
    same = key in OUTSIDE or key.startswith("eval.")
    assert (digest(with_leaf(FULL, *key.split("."))) == digest(FULL)) == same


def test_digest_ignores_pairs_that_are_not_used():
    few, many = (tiny.config("edm", regression__pairs__count=n) for n in (16, 32))
    assert digest(few) == digest(many)
    few, many = (tiny.config("edm", regression__weight=1.0, regression__pairs__count=n) for n in (16, 32))
    assert digest(few) != digest(many)


def test_digest_does_not_change_with_the_list_of_teacher_samplers():
    more = {"ode": {"solver": "heun", "steps": 4}, "sde": {"solver": "heun", "steps": 9, "churn": 2.0}}
    assert digest(tiny.config("edm", eval__teacher_samplers=more)) == digest(tiny.config("edm"))


def test_digest_is_a_function_of_values_and_not_of_their_order():
    values = tiny.values("edm")
    backwards = {key: dict(reversed(section.items())) for key, section in reversed(values.items())}
    assert digest(RunConfig.model_validate(backwards)) == digest(RunConfig.model_validate(values))


def test_digest_is_eight_hex_digits():
    assert len(digest(FULL)) == 8
    int(digest(FULL), 16)


# Pair sets.
def test_runs_with_the_same_teacher_solver_and_count_share_their_pairs():
    a = tiny.config("edm", regression__weight=0.25)
    b = tiny.config("edm", regression__weight=5.0, critic__ratio=1, optim__lr=1.0, regression__distance="lpips")
    assert a.pair_set == b.pair_set


@pytest.mark.parametrize("change", [
    {"regression__pairs__count": 32}, {"regression__pairs__sampler": {"solver": "heun", "steps": 9}},
    {"teacher__name": "other"}, {"data__name": "other"},
])  # fmt: skip
def test_another_teacher_solver_or_count_makes_another_pair_set(change):
    assert tiny.config("edm", **change).pair_set != tiny.config("edm").pair_set


# What is refused.
WRONG = {
    "unknown key": {"critic__ration": 5},
    "text for a number": {"critic__ratio": "five"},
    "number in quotes": {"optim__lr": "2e-6"},
    "fraction for a count": {"optim__batch": 4.5},
    "number for a bool": {"dm__alpha_factor": 1},
    "ratio 0": {"critic__ratio": 0},
    "negative weight": {"dm__weight": -1.0},
    "index beyond the grid": {"dm__index_range": [20, 1000]},
    "index range of three": {"dm__index_range": [20, 500, 980]},
    "infinite rate": {"optim__lr": float("inf")},
    "NaN weight": {"dm__weight": float("nan")},
    "unknown input": {"generator__input": "latents"},
    "noise for several steps": {"generator__steps": 4},
    "guidance below 1": {"teacher__guidance": 0.5},
    "rescaled velocity of no flow": {"teacher__rescale": "row"},
    "train without network": {"teacher__train": {"steps": 1, "batch": 1, "lr": 1.0, "warmup": 0, "ema": 0.5}},
    "train and source": {
        "teacher__train": {"steps": 1, "batch": 1, "lr": 1.0, "warmup": 0, "ema": 0.5},
        "teacher__network": {},
        "teacher__source": "a.pkl",
    },
    "no metric": {"eval__metrics": []},
    "unknown weighting": {"critic__weighting": "snr"},
    "more shards than pairs": {"regression__pairs__shards": 17},
    "reversed index range": {"dm__index_range": [980, 20]},
    "reversed GAN noise range": {"gan__noise_range": [999, 0]},
    "reversed critic range": {"critic__index_range": [5, 4]},
    "unknown conditions": {"generator__conditions": "fake"},
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name):
    with pytest.raises(ValidationError):
        tiny.config("edm", **WRONG[name])


def test_ranges_may_differ_where_no_gan_would_share_their_noise():
    cfg = tiny.config("edm", gan__shares_noise=True, gan__lambda_g=0.0, gan__lambda_d=0.0)
    assert not [told for *_, told in problems(cfg, {}) if "shares_noise" in told]


@pytest.mark.parametrize("section", sorted(tiny.values("edm")))
def test_refuses_a_missing_section(section):
    values = tiny.values("edm")
    del values[section]
    with pytest.raises(ValidationError, match=section):
        RunConfig.model_validate(values)


@pytest.mark.parametrize("options", [
    {"solver": "ddim", "churn": 1.0}, {"solver": "heun", "eta": 0.5}, {"solver": "dpm"}, {"solver": "heun", "steps": 0},
    {"solver": "ddpm", "eta": 0.5}, {"solver": "pndm", "spacing": "leading"}, {"solver": "pndm", "steps": 1},
    {"solver": "ddim", "steps": 1000}, {"solver": "euler", "steps": 61},
])  # fmt: skip
def test_sampler_refuses(options):
    with pytest.raises(ValidationError):
        Sampler(**{"steps": 5, **options})


@pytest.mark.parametrize("options", [
    {"solver": "ddpm"}, {"solver": "ddim", "eta": 0.5}, {"solver": "heun", "churn": 4.0},
])  # fmt: skip
def test_pairs_need_a_deterministic_sampler(options):
    with pytest.raises(ValidationError, match="deterministic"):
        Pairs(count=4, shards=1, sampler=Sampler(steps=5, **options))


def test_the_teacher_rows_of_stable_diffusion_have_its_own_samplers():
    sd15, sdxl = (load_base(name, ROOT / "workflow/base") for name in ("sd15", "sdxl"))
    assert [s.solver for s in sd15.eval.teacher_samplers.values()] == ["pndm", "ddpm"]
    assert [(s.solver, s.spacing) for s in sdxl.eval.teacher_samplers.values()] == [("euler", "leading")] * 2
    assert sdxl.regression.pairs.sampler.spacing == "trailing"


def test_a_samplers_spacing_left_at_its_default_changes_no_digest():
    spec = {"solver": "euler", "steps": 50, "guidance": 3.0}
    assert Sampler(**spec).settings() == spec


def test_a_config_cannot_be_changed_after_validation():
    with pytest.raises(ValidationError):
        FULL.critic.ratio = 1


def test_json_round_trip_keeps_the_config():
    assert RunConfig.model_validate_json(FULL.model_dump_json()) == FULL


@pytest.mark.parametrize(("changes", "real", "pairs"), [
    ({}, True, False),
    ({"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}, False, False),
    ({"gan__lambda_g": 0.0, "gan__lambda_d": 0.0, "generator__input": "noised_real"}, True, False),
    ({"gan__lambda_g": 0.0, "gan__lambda_d": 0.0, "regression__weight": 1.0}, False, True),
    ({"gan__lambda_g": 0.0, "gan__lambda_d": 0.0, "generator__conditions": "real"}, True, False),
])  # fmt: skip
def test_a_run_needs_only_the_data_its_terms_read(changes, real, pairs):
    cfg = tiny.config("edm", **changes)
    assert (cfg.needs_real, cfg.needs_pairs) == (real, pairs)


def later(monkeypatch, known, default):
    """TrainConfig of a later version with one more key, and what its defaults.yaml says of it."""
    monkeypatch.setitem(section.DEFAULTS, "Later", known)
    return type("Later", (TrainConfig,), {"__annotations__": {"added": float}, "added": default})


def test_a_switch_that_a_later_version_adds_leaves_earlier_runs_as_they_are(monkeypatch):
    model, values = later(monkeypatch, {"added": 0.0}, 0.0), tiny.config().training().model_dump(mode="json")
    assert digest(model.model_validate(values)) == digest(TrainConfig.model_validate(values))
    assert digest(model.model_validate({**values, "added": 1.0})) != digest(model.model_validate(values))


@pytest.mark.parametrize("known", [{}, {"added": 1.0}])
def test_a_default_that_is_not_what_earlier_runs_had_stops_everything(monkeypatch, known):
    with pytest.raises(TypeError, match=r"default of Later\.added is 0\.0, .* see dmd2/experiment/defaults\.yaml"):
        later(monkeypatch, known, 0.0)


def test_no_pinned_default_was_forgotten():
    """A class or key that is gone may not leave an entry that seems to guard something."""
    classes = {cls.__name__: cls for cls in sections(section.Section)}
    for name, defaults in section.DEFAULTS.items():
        fields = classes[name].model_fields
        assert set(defaults) == {key for key, field in fields.items() if not field.is_required()}


def sections(cls):
    return [cls, *(below for sub in cls.__subclasses__() for below in sections(sub))]
