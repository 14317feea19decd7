"""Bases of published flow-matching transformers: their sizes, and turns at their full width on the meta device."""

import inspect
import math

import diffusers
import pytest

from dmd2.experiment.checks.transformers import SHAPES
from dmd2.experiment.tables import load_base
from dmd2.planning.memory import META, Counted, Setup
from dmd2.planning.plan import disk_of
from dmd2.training.teachers import build_network
from tests.tiny_flow_pipelines import FAMILIES, transformer_class
from tests.unit.test_transformers import PUBLISHED

# Base -> its published name, bytes of a caption on disk, and a few of its blocks: all of them take half a minute.
BASES = {
    "sd35-medium": ("SD3.5-medium", 2 * (333 * 4096 + 2048), {"num_layers": 2, "dual_attention_layers": [0]}),
    "flux-dev": ("FLUX.1-dev", 2 * (128 * 4096 + 768), {"num_layers": 1, "num_single_layers": 1}),
    "sana": ("Sana-1.6B", 2 * 300 * 2304, {"num_layers": 2}),
    "z-image": ("Z-Image", 2 * 128 * 2560, {"n_layers": 2, "n_refiner_layers": 1}),
}


@pytest.mark.parametrize("base", BASES)
def test_a_base_is_the_published_network(base):
    kind, count, _ = PUBLISHED[BASES[base][0]]
    cfg = load_base(base)
    with META:
        network = build_network(cfg.teacher.network, 0)
    assert type(network).__name__ == kind
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("base", BASES)
def test_a_turn_of_student_and_critic_has_the_shapes_of_the_base(base):
    _, caption, few = BASES[base]
    cfg = load_base(base)
    network = {**cfg.teacher.network, **few}
    teacher = cfg.teacher.model_copy(update={"network": network})
    pairs = cfg.regression.model_copy(update={"weight": 1.0, "distance": "l2"})
    small = cfg.model_copy(update={"teacher": teacher, "regression": pairs})
    counted = Counted(small, Setup(8, checkpointing=True))
    student, critic = (counted.iteration(1, update_student=turn) for turn in (True, False))
    assert student.flops > critic.flops > 0 and student.peak >= critic.peak > 0
    latents = 2 * 4 * math.prod(cfg.data.shape)  # noise and image, float32
    assert disk_of(small, counted).pairs == cfg.regression.pairs.count * (caption + latents)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_as_long_as_the_pipelines_make_them(family):
    encode = getattr(diffusers, FAMILIES[family]).encode_prompt
    assert (
        SHAPES[transformer_class(family)].tokens == inspect.signature(encode).parameters["max_sequence_length"].default
    )
