"""Python of the pages, put where its text says: losses, a metric and a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
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
from tests.docs.pages import Block, blocks, written
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


TRAINS = """
from pathlib import Path

import torch
from dmd2.method.step import train_step
from tests import tiny

def logged(**changes):
    cfg = tiny.config("edm", **changes)
    return train_step(tiny.models("edm", cfg), tiny.batches("edm", cfg).at(0), 0, cfg)

plain = logged()
tv = logged(generator__total_variation=0.5)
assert {"student/tv", "tv/down"} == tv.keys() - plain.keys() and torch.equal(tv["student/dm"], plain["student/dm"])
sim = logged(dm__weight=0.0, dm__score_implicit=1.0)
assert "student/sim" in sim and "student/dm" not in sim and torch.isfinite(sim["student/grad_norm"])
print(tiny.config("edm").generator.settings())

from dmd2.experiment.tables import load_experiment
rows = load_experiment(bases=Path("workflow/base")).runs
assert rows["digits", "dmd2-tv"].generator.total_variation == 0.5 and rows["digits", "dmd2"].generator.settings() == {
    "input": "noise", "steps": 1, "time": 80.0}
"""


def test_a_loss_and_a_method_are_a_file_a_line_and_a_field(tmp_path: Path, root: Path) -> None:
    """The page, followed in a copy of the package."""
    for name in ("dmd2", "eval", "tests"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    loss, imported, line, field, method = of_page("add-a-loss.md")
    text = next(block.page.read_text() for block in blocks("python") if block.page.name == "add-a-loss.md")
    objectives, settings = tmp_path / "dmd2/method/objectives", tmp_path / "dmd2/experiment"
    (objectives / "total_variation.py").write_text(loss)
    (objectives / "score_implicit.py").write_text(method)
    own = re.search(r"`(Term\(.*\),)`", text)[1]
    put(
        objectives / "terms.py",
        "class Term(",
        f"{imported}{imported.replace('total_variation', 'score_implicit')}\n\nclass Term(",
    )
    put(objectives / "terms.py", "STUDENT = [\n", f"STUDENT = [\n{line}    {own}\n")
    put(settings / "method_config.py", "    lora: Lora | None = None\n", f"    lora: Lora | None = None\n{field}")
    of_method = field.replace("total_variation", "score_implicit")
    put(
        settings / "method_config.py",
        "    alpha_factor: bool = False\n",
        f"    alpha_factor: bool = False\n{of_method}",
    )
    put(settings / "defaults.yaml", "Generator: {", "Generator: {total_variation: 0.0, ")
    put(
        settings / "defaults.yaml",
        "{logit_normal: null, normaliser",
        "{score_implicit: 0.0, logit_normal: null, normaliser",
    )
    shutil.copytree(root / "workflow/base", tmp_path / "workflow/base")
    (tmp_path / "workflow/tables").mkdir()
    (tmp_path / "workflow/tables/tv.yaml").write_text(written()["workflow/tables/tv.yaml"])
    ran = subprocess.run(
        [sys.executable, "-c", TRAINS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "."},
        text=True,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "total_variation" not in ran.stdout  # which is no part of the identity of earlier runs


def put(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


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
