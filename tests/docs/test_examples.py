"""Python of the pages, put where its text says: a metric and a network. The loss is in tests/unit/test_passes.py."""

import re
import sys
from types import ModuleType

import pytest
import torch

from dmd2.experiment import metrics
from dmd2.experiment.checks import transformers
from dmd2.experiment.checks.sections import problems
from dmd2.experiment.checks.transformers import SHAPES
from dmd2.networks.condition import Condition
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import FlowSchedule, add_noise
from dmd2.training.sharding import units
from eval.metrics import appearance
from tests import tiny as tiny_run
from tests.docs.pages import Block, blocks
from tests.tiny_transformers import TINY, texts, tiny

KIND = "AuraFlowTransformer2DModel"
SIZE = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1,
    "num_single_dit_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12,
    "caption_projection_dim": 32, "pos_embed_max_size": 16,
}  # fmt: skip
T = torch.tensor([1.0, 0.3, 0.75])
IMAGES = torch.randn(3, 4, 8, 4, generator=torch.Generator().manual_seed(2))


def of_page(name: str) -> list[str]:
    return [block.text for block in blocks("python") if block.page.name == name]


def test_every_python_block_has_its_test() -> None:
    def is_included(block: Block) -> bool:
        return block.text.startswith("--8<--")  # test_site.py builds the site, which needs the file

    pages = {block.page.name for block in blocks("python") if not is_included(block)}
    assert pages == {"add-a-loss.md", "add-a-metric.md", "add-a-network.md", "flow.md"}


def test_a_metric_is_two_entries_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    number, metric, function = of_page("add-a-metric.md")
    (number,), (metric,) = (eval(text, vars(metrics)) for text in (number, metric))
    exec(function, names := dict(vars(appearance)))
    monkeypatch.setitem(metrics.NUMBERS, number.name, number)
    monkeypatch.setitem(metrics.METRICS, metric.name, metric)
    monkeypatch.setattr(appearance, metric.function, names[metric.function], raising=False)
    assert metrics.measured(["fd", "contrast"]) == ["fd", "contrast"]
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    images[1, :, :2] = 255
    assert getattr(appearance, metric.function)(images).tolist() == [0.0, 0.5]


@pytest.fixture
def aura(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family of the page in place."""
    code, shape = of_page("add-a-network.md")
    module = ModuleType("dmd2.networks.transformers.aura")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(SHAPES, *eval(f"{{{shape}}}", vars(transformers)).popitem())
    monkeypatch.setitem(TINY, KIND, SIZE)


def test_a_family_is_a_file_and_a_line(aura: None) -> None:
    network, captions = tiny(KIND), texts(3)
    denoiser = FlowDenoiser(network)
    for tap, block in enumerate(denoiser.family.blocks(network)):
        heard = []
        hook = block.register_forward_hook(lambda *given, heard=heard: heard.append(given[-1]))
        denoiser.taps = [tap]
        denoiser(IMAGES, T, captions)
        hook.remove()
        hidden = heard[0][1] if isinstance(heard[0], tuple) else heard[0]
        tokens = denoiser.features(IMAGES, T, captions).flatten(2).mT
        assert torch.allclose(tokens, hidden[:, -tokens.shape[1] :], atol=1e-5)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    shown = [denoiser(IMAGES, T, Condition(labels=torch.full((3,), label))) for label in (0, 11)]
    assert not torch.allclose(*shown, atol=1e-4), "classes are a condition"


def test_that_family_is_checked_and_split_by_blocks(aura: None) -> None:
    def told(**changes: int) -> list[str]:
        network = {"_class_name": KIND, **SIZE, **changes}
        cfg = tiny_run.config("flow-sd3", data__channels=4, teacher__network=network, gan__tap=2)
        return [problem[0] for problem in problems(cfg, {})]

    assert told() == []
    assert told(in_channels=3) == ["teacher.network.in_channels"]
    assert told(joint_attention_dim=4) == ["teacher.network.joint_attention_dim"]
    assert told(num_single_dit_layers=1) == ["gan.tap"]
    denoiser = FlowDenoiser(tiny(KIND))
    assert units(denoiser) == denoiser.family.blocks(denoiser.network)


def test_only_unshifted_sigmas_give_a_students_levels() -> None:
    (code,) = of_page("flow.md")
    exec(code, names := {})
    students = [*FlowSchedule(3.0).step_times(4, 1.0), 0]
    for name, line in re.findall(r"^(\w+) = scheduler.sigmas  # (.*)$", code, re.M):
        sigmas = names[name].tolist()
        assert sigmas == pytest.approx([float(one) for one in line.split(",")], abs=6e-4)
        assert (sigmas == pytest.approx(students)) == (name == "right")


def test_sign_and_time_of_that_family_give_the_clean_images_back(aura: None, monkeypatch) -> None:
    network, n = tiny(KIND), torch.randn(IMAGES.shape)

    def truth(hidden_states, timestep, **_):
        assert torch.equal(timestep, T)
        return type("Output", (), {"sample": n - IMAGES})

    monkeypatch.setattr(network, "forward", lambda x, **given: truth(x, **given))
    denoiser = FlowDenoiser(network)
    x_t = add_noise(denoiser.schedule, IMAGES, n, T)
    assert torch.allclose(denoiser(x_t, T, texts(3)), IMAGES, atol=1e-6)
