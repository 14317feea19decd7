"""From the sampler to features on the device: nothing waits but the thread that copies a whole shard to the host."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dmd2.data.captions import EvalPrompts
from dmd2.data.sets import TensorSet
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.metrics import of_option
from dmd2.training.sampling import sample_teacher, student_sample
from eval.detectors import features
from eval.detectors.beside import after_current, second
from eval.detectors.detectors import Classifier
from eval.detectors.features import extract, join
from eval.detectors.networks import DinoV2
from eval.detectors.reading import Sampled
from eval.metrics.frechet import FeatureStats, Reference
from eval.metrics.measures import Sample, measure
from eval.pixels.resize import NONE, Geometry
from eval.runs.protocol import Observers
from tests import tiny
from tests.eval.test_networks import REDUCED, dino  # noqa: F401
from tests.gpu.test_sampling import SEEDS, SOLVERS
from tests.waits import nothing_waits

CPU, COUNT, ROWS, BATCH = torch.device("cpu"), 50, 20, 8
TOLERANCE = 1e-3  # of the SD over images


def observers(device: torch.device, path: Path) -> Observers:
    """A classifier and a vision transformer behind both exact resizes, with every statistic of pixels."""
    torch.manual_seed(0)
    classifier = Classifier("tiny-classifier", 1, tiny.SIZE, 4).on(device)
    weights = SimpleNamespace(path=path, sha256="0" * 64, verified=False)
    transformer = DinoV2("dinov2-random", weights, **REDUCED).on(device)
    others = {name: (transformer, Geometry(name)) for name in ("square-crop+lanczos-12", "patch-9-official")}
    return Observers(classifier, NONE, others, ["saturation", "sharpness"])


def samples(device: torch.device, name: str) -> Sampled:
    """Images of a two-step student on the device."""
    cfg = tiny.config("edm", generator={"input": "backward_simulation", "steps": 2, "time": 80.0})
    student = tiny.denoiser("edm").eval().to(device)
    return Sampled(name, COUNT, sample=lambda seeds: student_sample(student, cfg, seeds, device), rounding="trunc")


def test_a_shard_is_copied_back_once_and_nothing_else_waits(
    device: torch.device, dino: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    if device.type == "cpu":
        pytest.skip("a CPU has nobody to wait for")
    monkeypatch.setattr(features, "ROWS", ROWS)
    observer, store, calls = observers(device, dino[0]), features._Outputs.store, list[tuple]()
    first = samples(device, "first")
    extract(first, observer, tmp_path, batch=BATCH)  # schedules and filters are uploaded
    monkeypatch.setattr(features._Outputs, "store", lambda *arguments: calls.append(arguments))
    with nothing_waits(device) as uploads:
        folder = extract(replace(first, id="second"), observer, tmp_path, batch=BATCH)
    assert len(calls) == -(-COUNT // ROWS) and len(uploads) < 60
    monkeypatch.setattr(features._Outputs, "store", store)
    for call in calls:
        assert all(tensor.device == device for part in call[1] for tensor in part.values())
        store(*call)
    ours = join(folder, COUNT).found
    theirs = join(extract(samples(CPU, "cpu"), observers(CPU, dino[0]), tmp_path, batch=BATCH), COUNT).found
    assert ours.keys() == theirs.keys()
    same = ours["pixels"] == theirs["pixels"]  # an image at the edge of two bytes may fall on either side
    assert same.mean() > 0.8
    for name in ours.keys() - {"pixels"}:
        spread = theirs[name].std(axis=0).mean()
        assert np.abs(ours[name] - theirs[name])[same].max() <= TOLERANCE * spread, name


def made_by(name: str, device: torch.device) -> Callable[[], Tensor]:
    kind, spec = SOLVERS[name][0], Sampler.model_validate(SOLVERS[name][1])
    teacher, cfg = tiny.denoiser(kind).eval().to(device), tiny.config(kind)
    prompts = EvalPrompts([], TensorSet(tiny.tensors(kind, 3)))
    return lambda: sample_teacher(teacher, cfg, spec, SEEDS, device, prompts.condition(SEEDS, device))


@pytest.mark.parametrize("name", SOLVERS)
def test_no_sampler_waits(name: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has nobody to wait for")
    sample = made_by(name, device)
    first = sample().cpu()
    with nothing_waits(device):
        again = sample()
    assert torch.equal(again.cpu(), first)


def test_features_made_beside_the_sampler_are_those_made_after_it(
    real_device: torch.device, dino: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A missing order between the two queues of a GPU would mix images of different batches."""
    monkeypatch.setattr(features, "ROWS", 200)
    source = replace(samples(real_device, "beside"), count=400)
    beside = join(extract(source, observers(real_device, dino[0]), tmp_path / "beside", batch=BATCH), 400).found
    monkeypatch.setattr(features, "second", lambda _: None)
    after = join(extract(source, observers(real_device, dino[0]), tmp_path / "after", batch=BATCH), 400).found
    assert np.array_equal(beside["pixels"], after["pixels"])
    for name in after:
        np.testing.assert_allclose(beside[name], after[name], rtol=1e-5, atol=1e-5)


def test_the_second_queue_waits_for_the_images_and_holds_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()
    stream = SimpleNamespace(device="cuda:0", wait_stream=lambda other: asked.append(f"after {other}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "sampler")
    monkeypatch.setattr(torch.cuda, "stream", lambda into: nullcontext(asked.append(into)))
    tensors = [SimpleNamespace(is_cuda=cuda, record_stream=asked.append) for cuda in (True, False)]
    with after_current(stream, tensors):
        asked.append("network")
    assert asked == ["after sampler", stream, stream, "network"]
    with after_current(second(CPU), [torch.zeros(1)]):
        assert len(asked) == 4


def test_all_extractions_share_one_second_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.detectors.beside.pinned", lambda _: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    assert second(torch.device("cuda", 63)) is second(torch.device("cuda", 63))
    second.cache_clear()


@pytest.mark.parametrize("option", ["kid", "prdc", "pr"])
def test_kernels_and_neighbours_are_those_of_the_cpu(option: str, device: torch.device) -> None:
    real, fake = (np.random.default_rng(seed).normal(5, 1, (300, 24)).astype(np.float32) for seed in (1, 2))
    reference, classes = Reference(FeatureStats.of(real), real), torch.arange(300) % 3
    ours, theirs = (
        measure(of_option(option), {"detector": Sample(fake, None, "d", reference, strata=classes, device=place)}, {})
        for place in (device, CPU)
    )
    assert ours.keys() == theirs.keys() and ours
    for name, estimate in ours.items():
        assert (estimate.value, estimate.se) == pytest.approx((theirs[name].value, theirs[name].se), rel=1e-5), name
