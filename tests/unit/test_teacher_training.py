"""A teacher trained here: what its checkpoints belong to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dmd2.training.make_teacher
from dmd2.core.files import listing, write_json
from dmd2.core.rng import Draws
from dmd2.data.pipelines import NULL
from dmd2.data.sets import TensorSet, load_shard, save_shard
from dmd2.experiment.config import Data
from dmd2.experiment.run_inputs import pipeline_manifest
from dmd2.experiment.teacher_config import TeacherTraining
from dmd2.networks.condition import Condition
from dmd2.networks.flow import FlowDenoiser
from dmd2.training.__main__ import teacher as main
from tests import tiny
from tests.tiny_transformers import tiny as transformer

SPEC = {"steps": 2, "batch": 4, "lr": 1e-3, "warmup": 0, "ema": 0.5, "label_dropout": 0.5}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dmd2.training.make_teacher, "CHECKPOINT_EVERY", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Manifest of one file of tensors."""
    save_shard(path / NULL, tensors)
    write_json(path / "manifest.json", {"files": listing([path / NULL], path)})
    return path / "manifest.json"


def trained(kind: str, folder: str, rows: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """Weights of a teacher that is trained in `folder` on these rows, or goes on from what is found there."""
    data = {**tiny.values(kind)["data"], **changes}
    network = {"_class_name": tiny.KINDS[kind][1].__name__, **tiny.KINDS[kind][2]}
    teacher = {"name": "t", "parameterisation": tiny.KINDS[kind][0], "guidance": 1.0, "network": network, "train": SPEC}
    out = Path(folder) / "manifest.json"
    main(data=json.dumps(data), teacher=json.dumps(teacher), out=out, real=made(Path("real"), rows))
    return load_shard(out.parent / "unet/diffusion_pytorch_model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("kind", "condition"), [("eps-labels", "labels"), ("eps-text", "text")])
def test_other_conditions_of_the_same_images_begin_anew(kind: str, condition: str) -> None:
    rows = tiny.tensors(kind, 16)
    null(0.0)
    first = trained(kind, "a", rows)
    changed = {**rows, condition: rows[condition].flip(0)}
    again, fresh = (trained(kind, folder, changed) for folder in ("a", "b"))
    assert not equal(first, fresh)
    assert equal(again, fresh)


def test_another_unconditional_text_begins_anew() -> None:
    rows = tiny.tensors("eps-text", 16)
    null(0.0)
    first = trained("eps-text", "a", rows)
    null(1.0)
    again, fresh = (trained("eps-text", folder, rows) for folder in ("a", "b"))
    assert not equal(first, fresh)
    assert equal(again, fresh)


def null(value: float) -> None:
    """Write the pipeline whose unconditional text has this value throughout."""
    manifest = pipeline_manifest(Data.model_validate(tiny.values("eps-text")["data"]))
    assert manifest is not None
    made(manifest.parent, {"text": torch.full((1, tiny.TOKENS, tiny.TEXT_WIDTH), value)})


def test_a_teacher_that_diverged_at_the_end_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd2.training.make_teacher, "CHECKPOINT_EVERY", 100)
    rows = tiny.tensors("edm", 16)
    with pytest.raises(SystemExit, match="the loss is nan at step 2; lower train.lr"):
        trained("edm", "a", {**rows, "images": rows["images"] * float("nan")})
    assert not Path("a/manifest.json").exists()


def test_a_training_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, steps = tiny.tensors("edm", 16), list[int]()
    original = dmd2.training.make_teacher._denoising_step

    def killed(denoiser, real, draws, *rest):  # type: ignore[no-untyped-def]
        steps.append(draws.iteration)
        if steps == [0, 1]:
            raise KeyboardInterrupt
        return original(denoiser, real, draws, *rest)

    whole = trained("edm", "a", rows)
    monkeypatch.setattr(dmd2.training.make_teacher, "_denoising_step", killed)
    with pytest.raises(SystemExit):
        trained("edm", "b", rows)
    assert equal(trained("edm", "b", rows), whole)
    assert steps == [0, 1, 1]


@pytest.mark.parametrize("condition", ["labels", "text"])
def test_a_flow_teacher_learns_the_velocity_at_logit_normal_levels_and_in_their_share_without_condition(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TeacherTraining(**{**SPEC, "batch": 64, "p_mean": 0.5, "p_std": 1.5})
    denoiser, draws = FlowDenoiser(transformer("SD3Transformer2DModel"), shift=3.0), Draws(0, 0, 64, 0, 64)
    rows = {"images": torch.randn(64, 4, 8, 8), "labels": torch.randint(4, (64,))}
    null = Condition(labels=torch.tensor([4]))
    if condition == "text":
        rows = {"images": rows["images"], "text": torch.randn(64, 6, 12), "pooled": torch.randn(64, 12)}
        null = Condition(text=torch.zeros(1, 6, 12), pooled=torch.zeros(1, 12))
    seen: list[tuple[Tensor, Tensor, Condition]] = []
    monkeypatch.setattr(denoiser, "forward", lambda *given: seen.append(given) or given[0])
    loss = dmd2.training.make_teacher._denoising_step(denoiser, TensorSet(rows), draws, null, spec)
    ((_, t, cond),) = seen
    u = (0.5 + 1.5 * draws.normal("teacher/level", ())).sigmoid()
    torch.testing.assert_close(t, 3 * u / (1 + 2 * u))
    dropped = draws.integers("teacher/dropout", 0, 9999) < 5000
    order = draws.shuffled("teacher/real", 64)
    for name in {"labels": ["labels"], "text": ["text", "pooled"]}[condition]:
        kept = rows[name][order].masked_fill(
            dropped.reshape(-1, *[1] * (rows[name].ndim - 1)), float(name == "labels") * 4
        )
        assert torch.equal(getattr(cond, name), kept) and 0 < dropped.sum() < 64
    # A prediction of x_t itself says the velocity 0.
    noise = draws.normal("teacher/noise", (4, 8, 8))
    assert loss.item() == pytest.approx((noise - rows["images"][order]).square().mean().item(), rel=1e-4)
