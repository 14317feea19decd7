"""Network roles at the start of training (1.1): three copies of one network, and a head that belongs to the seed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2.core.errors import UserError
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import Inputs
from dmd2.training.build import build_models
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.teachers import build_network, load_teacher, null_condition
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["edm", "eps-labels"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def manifest(kind, tmp_path_factory):
    return tiny.teacher(tmp_path_factory.mktemp(kind), kind)


def built(kind, manifest, seed=0, **changes):
    return build_models(tiny.config(kind, **changes), seed, Inputs(manifest, None, None, None), CPU)


def test_student_teacher_and_critic_start_as_copies_of_one_network(kind, manifest):
    m = built(kind, manifest)
    reference = tiny.weights(tiny.network(kind, seed=5))
    assert all(tiny.same(reference, d.network) for d in (m.student, m.teacher, m.critic))


def test_they_share_no_memory(kind, manifest):
    m = built(kind, manifest)
    pointers = [{p.data_ptr() for p in d.parameters()} for d in (m.student, m.teacher, m.critic)]
    assert not pointers[0] & pointers[1]
    assert not pointers[0] & pointers[2]
    assert not pointers[1] & pointers[2]


def test_the_teacher_alone_is_frozen_and_in_eval_mode(kind, manifest):
    m = built(kind, manifest)
    assert not any(p.requires_grad for p in m.teacher.parameters())
    assert all(p.requires_grad for d in (m.student, m.critic, m.head) for p in d.parameters())
    assert (m.teacher.training, m.student.training, m.critic.training) == (False, True, True)


def test_optimisers_hold_the_student_and_the_critic_with_its_head(kind, manifest):
    m = built(kind, manifest)
    assert {id(p) for p in m.student_optimiser.parameters} == {id(p) for p in m.student.parameters()}
    joint = [*m.critic.parameters(), *m.head.parameters()]
    assert {id(p) for p in m.critic_optimiser.parameters} == {id(p) for p in joint}


def test_the_heads_first_weights_belong_to_the_seed(kind, manifest):
    torch.manual_seed(1)
    first = tiny.weights(built(kind, manifest, seed=0).head)
    torch.manual_seed(2)
    assert tiny.same(first, built(kind, manifest, seed=0).head)
    assert not tiny.same(first, built(kind, manifest, seed=1).head)


def test_there_is_no_head_without_gan_and_no_distance_without_regression(kind, manifest):
    m = built(kind, manifest, gan__lambda_g=0.0, gan__lambda_d=0.0)
    assert m.head is None
    assert m.distance is None


def test_bf16_stores_the_eps_teacher_in_bf16_and_everything_trained_in_fp32(kind, manifest):
    m = built(kind, manifest, train__precision="bf16")
    half = torch.bfloat16 if kind.startswith("eps") else torch.float32
    assert {p.dtype for p in m.teacher.parameters()} == {half}
    assert {p.dtype for d in (m.student, m.critic, m.head) for p in d.parameters()} == {torch.float32}


def test_a_guided_class_teacher_gets_the_extra_class_as_null(kind, manifest):
    assert built(kind, manifest).null is None
    assert built(kind, manifest, teacher__guidance=2.0).null.labels.tolist() == [tiny.CLASSES]


def test_all_networks_of_a_flow_know_its_settings(tmp_path):
    settings = {"teacher__shift": 3.0, "teacher__rescale": "row", "teacher__guidance_embed": 2.0}
    m = built("flow-sd3", tiny.teacher(tmp_path, "flow-sd3"), **settings)
    for one in (m.teacher, m.student, m.critic):
        assert (one.schedule.shift, one.rescale, one.family.guidance_embed) == (3.0, "row", 2.0)


def test_a_changed_teacher_file_is_named(kind, manifest, tmp_path):
    record = json.loads(manifest.read_text())
    record["files"][-1]["sha256"] = "0" * 64
    copy = manifest.parent / "changed.json"
    copy.write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not match the checksum"):
        load_teacher(copy, "edm")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda weights: weights.pop("conv_in.weight"),
            "the weights lack 1 tensors of config.json, such as conv_in.weight",
        ),
        (lambda weights: weights.update({"conv_in.bias": torch.zeros(3)}), "the weights do not fit config.json"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, change, told):
    tiny.network("edm", seed=1).save_pretrained(tmp_path / "unet", safe_serialization=True)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    made = adopt_teacher(Teacher(name="t", parameterisation="edm", guidance=1.0), tmp_path)
    with pytest.raises(UserError, match=told):
        load_teacher(made, "edm")


def test_a_teacher_the_user_has_not_put_there_is_told(tmp_path):
    with pytest.raises(UserError, match="put a diffusers UNet"):
        adopt_teacher(Teacher(name="t", parameterisation="edm", guidance=1.0), tmp_path)


def test_a_freshly_built_network_belongs_to_its_seed():
    spec = {key: value for key, value in tiny.KINDS["edm"][2].items()}
    torch.manual_seed(1)
    first = tiny.weights(build_network(spec, 0))
    torch.manual_seed(2)
    assert tiny.same(first, build_network(spec, 0))
    assert not tiny.same(first, build_network(spec, 1))


def test_no_null_condition_without_guidance():
    assert null_condition(tiny.config("edm").data, 1.0, tiny.network("edm", 0)) is None


@pytest.mark.parametrize("embeds", [4, None])
def test_guidance_by_a_teacher_without_the_class_of_none_is_refused(embeds):
    network, data = tiny.network("edm", 0), tiny.config("edm").data
    network.register_to_config(num_class_embeds=embeds)
    with pytest.raises(
        UserError, match=f"a guidance scale of 2 needs a teacher with num_class_embeds 5.* has {embeds}"
    ):
        null_condition(data, 2.0, network)
    network.register_to_config(num_class_embeds=5)
    assert null_condition(data, 2.0, network).labels.tolist() == [4]
