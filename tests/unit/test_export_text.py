"""Exported students of text: what diffusers' own pipelines make of the folder, as its card tells it."""

import re
import runpy
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dmd2.convert.kohya import from_kohya, merge
from dmd2.core.run import RunId
from dmd2.experiment.config import Teacher
from dmd2.method.samplers import few_step
from dmd2.networks.condition import Condition
from dmd2.networks.lora import add_lora, lora_state, merged_state
from dmd2.publish.diffusers_folder import export
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.snapshot import find_snapshot
from dmd2.training.teachers import wrap
from tests import tiny, tiny_pipelines
from tests.exported import run_alone, written

KINDS = {
    "sd15": (tiny_pipelines.sd15, StableDiffusionPipeline, "eps-text"),
    "sdxl": (tiny_pipelines.sdxl, StableDiffusionXLPipeline, "eps-sdxl"),
}
RUNS = [("sdxl", 4, 999), ("sdxl", 1, 399), ("sd15", 1, 999)]
SIDE, PROMPT, SEED = tiny_pipelines.LATENTS, "a photo of a cat", 3
TIMES = {(4, 999): [999, 749, 499, 249], (1, 399): [399], (1, 999): [999]}
pytestmark = pytest.mark.usefixtures("own_folder")


@dataclass
class Exported:
    """A teacher's pipeline, the network of a student of it with its config, and the folder the student is exported to."""

    teacher: Path
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline
    network: nn.Module
    run: RunId
    times: list[float]
    out: Path = Path("out")

    @staticmethod
    def of(kind: str, steps: int, first: int, lora: bool = False, **changes) -> "Exported":
        make, pipeline, sort = KINDS[kind]
        pipe = pipeline.from_pretrained(make(Path(kind)))
        pipe.unet.save_pretrained("data/teachers/tiny/unet", safe_serialization=True)
        adopt_teacher(Teacher(name="tiny", parameterisation="eps", guidance=1.0), Path("data/teachers/tiny"))
        generator = {"input": "noise" if steps == 1 else "backward_simulation", "steps": steps, "time": first}
        cfg = tiny.config(
            sort, generator=generator | ({"lora": {"rank": 3, "alpha": 2.0}} if lora else {}), teacher__name="tiny",
            data__text={"pipeline": {"name": kind}, "latents": True}, **changes,
        ).training()  # fmt: skip
        network = student_of(pipe.unet, lora)
        run = written(RunId("tiny", "student", 0), cfg, network)
        export(find_snapshot(run), Path("out"))
        return Exported(Path(kind), pipe, network, run, TIMES[steps, first])

    @property
    def card(self) -> str:
        return (self.out / "README.md").read_text()

    def snippets(self) -> list[str]:
        """Python of the card that makes an image with the teacher's pipeline."""
        return [
            code
            for code in re.findall(r"```python\n(.*?)```", self.card, re.S)
            if "TEACHER" in code and "def " not in code
        ]

    def run_snippet(self, code: str, scheduler: LCMScheduler | None = None) -> torch.Tensor:
        """The latents that a snippet's pipeline makes where it makes an image, from noise of our seed."""
        call = "guidance_scale=0, generator=torch.Generator().manual_seed(SEED), output_type='latent')"
        assert code.count("guidance_scale=0)") == 1
        names = {"TEACHER": str(self.teacher), "STUDENT": str(self.out), "torch": torch, "SEED": SEED}
        exec(code.replace("guidance_scale=0)", call), names)
        return names["image"][None]

    def condition(self) -> Condition:
        """Of the prompt, by the teacher's pipeline."""
        sized = isinstance(self.pipe, StableDiffusionXLPipeline)
        encoded = self.pipe.encode_prompt(
            PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pixels = SIDE * tiny_pipelines.FACTOR
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32)
        return Condition(text=encoded[0], pooled=encoded[2] if sized else None, time_ids=sizes if sized else None)

    @torch.no_grad()
    def ours(self, weights: dict | None = None) -> torch.Tensor:
        """Latents of our sampler at the noise that the pipeline draws from one generator: the start, then each step's."""
        network = UNet2DConditionModel.from_config(self.pipe.unet.config)
        network.load_state_dict(merged_state(self.network) if weights is None else weights)
        generator = torch.Generator().manual_seed(SEED)
        start, *fresh = (torch.randn(1, 4, SIDE, SIDE, generator=generator) for _ in self.times)
        return few_step(wrap(network, "eps").eval(), start, self.times, self.condition(), lambda i: fresh[i])


def student_of(unet, lora: bool):
    """A UNet whose weights differ from its teacher's, as after a training, or which has random factors."""
    network = deepcopy(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if lora:
            add_lora(network, 3, 2.0)
        for name, parameter in network.named_parameters():
            if not lora or "lora_B" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def close(theirs: torch.Tensor, ours: torch.Tensor, bound: float = 1e-4) -> None:
    assert theirs.shape == ours.shape and torch.isfinite(ours).all()
    assert (theirs - ours).abs().max() <= bound * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize(("kind", "steps", "first"), RUNS)
def test_diffusers_own_pipeline_makes_our_latents_as_the_card_says(kind, steps, first):
    made = Exported.of(kind, steps, first)
    [code] = made.snippets()
    assert f"timesteps={made.times}" in code and KINDS[kind][1].__name__ in code
    ours = made.ours()
    close(made.run_snippet(code), ours)
    assert (made.ours(made.pipe.unet.state_dict()) - ours).abs().max() > 0.01  # the teacher's weights make others


def test_a_scheduler_built_from_the_teachers_makes_the_same():
    made = Exported.of("sdxl", 4, 999)
    made.pipe.unet = UNet2DConditionModel.from_pretrained(made.out, subfolder="unet")
    made.pipe.scheduler = LCMScheduler.from_config(made.pipe.scheduler.config)
    options = {"timesteps": made.times, "guidance_scale": 0, "output_type": "latent"}
    theirs = made.pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), **options).images
    close(theirs, made.ours())


@pytest.mark.parametrize(("kind", "steps", "first"), RUNS)
def test_an_exported_lora_in_diffusers_is_the_student(kind, steps, first):
    made = Exported.of(kind, steps, first, lora=True)
    whole, factors = made.snippets()
    close(made.run_snippet(whole), made.ours())
    assert "rank 3, alpha 2," in made.card and "`lora_fp16.safetensors` is in kohya's format" in made.card
    base, file = made.pipe.unet.state_dict(), load_file(made.out / "lora_fp16.safetensors")
    merged = merge(base, from_kohya(file, base, made.out))
    close(made.run_snippet(factors), made.ours(merged))
    for name, value in merged_state(made.network).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-4)  # of float16
    assert len(file) == len(lora_state(made.network))


def test_factors_on_another_runs_student_are_not_published_as_those_of_the_teacher():
    made = Exported.of("sdxl", 1, 399, lora=True, train__init_from="earlier")
    assert not (made.out / "lora_fp16.safetensors").exists() and "kohya" not in made.card
    assert len(made.snippets()) == 1 and "initialised from the run `earlier`" in made.card


def test_the_single_file_is_the_unet_in_half_precision():
    made = Exported.of("sd15", 1, 999)
    single = load_file(made.out / "unet_fp16.safetensors")
    network = UNet2DConditionModel.from_pretrained(made.out / "unet", use_safetensors=True)
    assert single.keys() == network.state_dict().keys()
    assert all(torch.equal(single[name], value.half()) for name, value in network.state_dict().items())
    assert not (made.out / "lora_fp16.safetensors").exists()


@pytest.mark.parametrize(("kind", "steps", "first"), RUNS)
def test_the_script_makes_images_of_prompts_and_latents_of_embedded_ones(kind, steps, first):
    made = Exported.of(kind, steps, first)
    plain = runpy.run_path(str(made.out / "sample.py"))
    [image] = plain["generate"](str(made.teacher), [PROMPT], SEED)
    pixels = made.pipe.vae.decode(made.ours() / made.pipe.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().detach().numpy()
    assert np.abs(np.asarray(image, dtype=np.float32) - expected).max() <= 1
    if steps > 1:  # the command, in a process that lacks our packages
        prompts = ["--teacher", str(made.teacher.absolute()), "--prompt", PROMPT, "--seed", str(SEED)]
        run_alone((made.out / "sample.py").absolute(), [*prompts, "--out", "cat.jpg"])
        np.testing.assert_array_equal(np.asarray(Image.open(made.out / "cat.png")), np.asarray(image))

    generator = torch.Generator().manual_seed(SEED)
    noise = {
        name: torch.randn(1, 4, SIDE, SIDE, generator=generator)
        for name in ["noise", "step0", "step1", "step2"][:steps]
    }
    extra = {name: value for name, value in vars(made.condition()).items() if value is not None}
    save_file({**noise, **extra}, made.out / "inputs.safetensors")
    close(plain["sample"](*plain["load"](), load_file(made.out / "inputs.safetensors")), made.ours(), 1e-5)


def test_the_cards_head_says_what_kind_of_model_it_is():
    made = Exported.of("sdxl", 4, 999, lora=True)
    data = ModelCard.load(made.out / "README.md").data
    assert data.pipeline_tag == "text-to-image" and {"4-step", "four-step", "lora"} & set(data.tags) == {
        "four-step",
        "lora",
    }
    assert "| trained | factors of rank 3, alpha 2 (LoRA), merged |" in made.card
    assert not (made.out / "samples.png").exists()


def test_a_student_of_a_pipeline_made_here_has_no_stock_pipeline(tmp_path):
    made = Exported.of("sdxl", 1, 399)
    cfg = tiny.config(
        "eps-sdxl", generator={"input": "noise", "steps": 1, "time": 399.0},
        data__text={"pipeline": {"name": "own", "encoder": "all-minilm-l6-v2"}, "latents": True},
    )  # fmt: skip
    export(find_snapshot(written(RunId("tiny", "own", 0), cfg.training(), made.network)), tmp_path / "own")
    card = (tmp_path / "own/README.md").read_text()
    assert "encoded by the workbench's pipeline `own`" in card and "TEACHER" not in card
    assert "Pipeline" not in (tmp_path / "own/sample.py").read_text()
