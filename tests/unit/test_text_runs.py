"""What conditions a text run: the emoji, dropped captions, drawn prompts, and what is read for them."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dmd2.core.errors import UserError
from dmd2.core.run import RunId
from dmd2.data.emoji import FONT
from dmd2.data.readers import read
from dmd2.data.sets import TensorSet
from dmd2.experiment.config import Data
from dmd2.experiment.run_inputs import Inputs, eval_prompts, pair_prompts
from dmd2.experiment.tables import load_base
from dmd2.method.batches import Batches
from dmd2.networks.condition import Condition
from tests import tiny

needs_font = pytest.mark.skipif(not FONT.exists(), reason=f"{FONT} is missing: apt-get install fonts-noto-color-emoji")


def drawn(part=0, parts=1, pixels=16, **source):
    text = {"pipeline": {"name": "p"}, "latents": False}
    data = Data(name="set", source={"kind": "emoji", **source}, resolution=8, channels=3, classes=0, text=text)
    blocks = list(read(data, pixels, part, parts))
    return np.concatenate([images for images, _ in blocks]), [name for _, names in blocks for name in names]


@needs_font
def test_emoji_are_coloured_pictures_on_white_with_their_names():
    images, names = drawn()
    assert len(images) == len(names) == len(set(names)) > 1300 and images.shape[1:] == (3, 16, 16)
    assert {"honeybee", "tropical fish", "black heart suit"} <= set(names)
    red, green, blue = images[names.index("red apple")].reshape(3, -1).mean(1)
    assert red > green + 30 and red > blue + 30
    assert (images[:, :, 0, 0] > 200).mean() > 0.6  # corners; some emoji are squares


@needs_font
def test_parts_of_the_emoji_are_all_of_them_in_order():
    images, names = drawn()
    parts = [drawn(part, 3) for part in range(3)]
    assert [name for _, some in parts for name in some] == names
    assert (np.concatenate([some for some, _ in parts]) == images).all()


def test_a_missing_font_is_told():
    with pytest.raises(UserError, match="none.ttf is missing .Debian: apt-get install fonts-noto-color-emoji"):
        drawn(path="none.ttf")


def test_dropped_captions_become_the_unconditional_one():
    text, pooled = torch.randn(3, 5, 8), torch.randn(3, 6)
    cond = Condition(text=text, pooled=pooled, time_ids=torch.ones(3, 6))
    null = Condition(text=torch.zeros(1, 5, 8), pooled=torch.zeros(1, 6))
    found = cond.where(torch.tensor([False, True, False]), null)
    assert torch.equal(found.text[[0, 2]], text[[0, 2]]) and not found.text[1].any() and not found.pooled[1].any()
    assert torch.equal(found.time_ids, cond.time_ids)  # sizes are not dropped
    labels = Condition(labels=torch.tensor([1, 2])).where(
        torch.tensor([True, False]), Condition(labels=torch.tensor([9]))
    )
    assert labels.labels.tolist() == [9, 2]


PROMPTED = {"data": {**tiny.values("eps-text")["data"], "text": {**tiny.TEXT, "prompts": "prompts.txt"}}}


def config(**changes):
    return tiny.config("eps-text", **changes).model_validate(tiny.config("eps-text", **changes).model_dump() | PROMPTED)


def test_a_one_step_student_is_trained_on_the_prompts_and_several_steps_on_captions():
    rows = {"text": torch.arange(3.0).reshape(3, 1, 1).expand(3, tiny.TOKENS, tiny.TEXT_WIDTH)}
    real = TensorSet(tiny.tensors("eps-text", 8))
    cfg = config()
    batches = Batches(cfg, 0, torch.device("cpu"), 4, real, prompts=TensorSet(rows))
    seen = torch.cat([next(batches.at(it)).cond.text[:, 0, 0] for it in range(3)])
    assert sorted(seen.tolist()) == sorted([0.0, 1.0, 2.0] * 4)  # every prompt once an epoch
    several = config(generator__input="backward_simulation", generator__steps=4)
    assert several.prompts is None and several.needs_real and cfg.prompts == "prompts.txt"


def test_prompts_and_pipeline_are_inputs_of_a_text_run_alone():
    read = Inputs.of(RunId("tiny", "dmd2", 0), config())
    assert str(read.prompts).startswith("data/prompts/tiny-prompts-") and "pipelines/tiny" in str(read.pipeline)
    plain = Inputs.of(RunId("tiny", "dmd2", 0), tiny.config("edm"))
    assert plain.prompts is None and plain.pipeline is None


def test_evaluation_and_pairs_take_the_captions_of_the_real_set_unless_prompts_are_named():
    cfg = tiny.config("eps-text")
    assert str(eval_prompts(cfg)) == str(pair_prompts(cfg.data)) == "data/real/tiny/manifest.json"
    assert "data/prompts/" in str(pair_prompts(config().data))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": 10}, "classes 10 and text exclude each other"),
        ({"text": None}, "has captions, no labels"),
        ({"channels": 3}, "Stable Diffusion's autoencoders have 4"),
        ({"text": None, "classes": 10}, "has captions, no labels"),
    ],
)
def test_a_contradicting_data_section_is_one_sentence(change, told):
    text = {"pipeline": {"name": "sd15"}, "latents": True}
    data = {"name": "x", "source": {"kind": "emoji"}, "resolution": 8, "channels": 4, "classes": 0, "text": text}
    Data.model_validate(data)
    with pytest.raises(ValidationError, match=told):
        Data.model_validate({**data, **change})


@pytest.mark.parametrize("base", ["sd15", "sdxl", "emoji"])
def test_shipped_text_bases_are_guided_latent_runs_with_a_clip_score(base):
    cfg = load_base(base)
    assert cfg.data.latents and cfg.teacher.guidance > 1 and cfg.eval.clip and "clip_score" in cfg.eval.metrics
