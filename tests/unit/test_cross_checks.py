"""Sections that do not fit each other: one sentence with file, line and key before anything runs."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.experiment.checks.measurement import networks
from dmd2.experiment.checks.network import defaults
from dmd2.experiment.checks.sections import second_time
from dmd2.experiment.inheritance import read_base
from dmd2.experiment.tables import load_base
from dmd2.experiment.yaml_file import read_yaml
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import call_network
from dmd2.networks.schedules import FlowSchedule, KarrasSchedule, VPSchedule
from dmd2.training import teachers
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.teachers import build_network
from eval.detectors.networks import NETWORKS
from tests import tiny
from tests.conftest import ROOT
from tests.experiment_folder import Folder

NET = "teacher.network"
SHAPED = {"data.channels": 3, f"{NET}.in_channels": 3, f"{NET}.out_channels": 3, "data.source.kind": "latents"}
# What a new user might write into a shipped base: keys with their values, the key that the sentence names, and a part.
WRONG: dict[str, dict[str, tuple[dict[str, Any], str, str]]] = {
    "digits": {
        "name with a folder": ({"data.name": "my/set"}, "data.name", "no name of a folder"),
        "name of a teacher with a space": ({"teacher.name": "my net"}, "teacher.name", "no name of a folder"),
        "channels of the set": ({"data.channels": 3}, "data.channels", "3, but the images of sklearn-digits have 1"),
        "resolution of the set": ({"data.resolution": 16}, "data.resolution", "16, but the images of sklearn-digits have 8"),
        "classes of the set": ({"data.classes": 12}, "data.classes", "12, but the images of sklearn-digits have 10"),
        "channels of the network": ({f"{NET}.in_channels": 3}, f"{NET}.in_channels", "is 3, but data.channels is 1"),
        "output of the network": ({f"{NET}.out_channels": 2}, f"{NET}.out_channels", "is 2, but data.channels is 1"),
        "size of the network": ({f"{NET}.sample_size": 32}, f"{NET}.sample_size", "is 32, but data.resolution is 8"),
        "levels": ({f"{NET}.block_out_channels": [16, 32, 64]}, f"{NET}.down_block_types", "has 2 blocks, but"),
        "too many levels": ({f"{NET}.block_out_channels": [8] * 5, f"{NET}.down_block_types": ["DownBlock2D"] * 5,
                             f"{NET}.up_block_types": ["UpBlock2D"] * 5}, f"{NET}.block_out_channels", "no multiple of 16"),
        "width that is none": ({f"{NET}.block_out_channels": [16, 0]}, f"{NET}.block_out_channels", "not a list of widths"),
        "block that is none": ({f"{NET}.down_block_types": ["DownBlock2D", "DownBlok2D"]}, f"{NET}.down_block_types",
                               "did you mean DownBlock2D?"),
        "groups": ({f"{NET}.norm_num_groups": 32}, f"{NET}.norm_num_groups", "a level of width 16 cannot be"),
        "head wider than a level": ({f"{NET}.add_attention": True, f"{NET}.attention_head_dim": 64},
                                    f"{NET}.attention_head_dim", "64 must be from 1 to the width"),
        "unknown class of network": ({f"{NET}._class_name": "UNet3D"}, f"{NET}._class_name", "there is no network UNet3D"),
        "misspelled argument": ({f"{NET}.layers_per_blok": 2}, f"{NET}.layers_per_blok", "did you mean layers_per_block?"),
        "classes of the network": ({f"{NET}.num_class_embeds": 1000}, f"{NET}.num_class_embeds", "data.classes is 10"),
        "fewer classes in the network": ({f"{NET}.num_class_embeds": 9}, f"{NET}.num_class_embeds", "data.classes is 10"),
        "Euler's steps of no flow": ({"generator.sampler": "euler"}, "generator.sampler", "of flow teachers, and this one is edm"),
        "guidance without no class": ({"teacher.guidance": 3.0}, f"{NET}.num_class_embeds", "teacher.guidance needs 11"),
        "drawn guidance without no class": ({"dm.guidance": [1.0, 3.0]}, f"{NET}.num_class_embeds", "dm.guidance needs 11"),
        "decoupled's switch of plain matching": ({"dm.renoise": "hybrid"}, "dm", "is of objective decoupled, and objective is dmd"),
        "SiD's switch of plain matching": ({"dm.sid_alpha": 1.2}, "dm", "sid_alpha 1.2 is of objective sid"),
        "logit-normal levels below the student's": (
            {"dm.objective": "decoupled", "dm.renoise": "constrained", "dm.logit_normal": [0.0, 1.0], "teacher.guidance": 2.0},
            "dm", "renoise constrained draws its levels uniformly"),
        "decoupled of drawn scales of 1": ({"dm.objective": "decoupled", "dm.guidance": [1.0, 1.0]}, "dm.objective",
                                           "dm.guidance is 1, none"),
        "divergence by a head of clean images": ({"dm.divergence": "js", "gan.noise_range": None}, "dm.divergence",
                                                 "it learns clean ones"),
        "guidance that falls": ({"generator.isg_guidance": [4.0, 2.0]}, "generator.isg_guidance", "[4.0, 2.0] is empty"),
        "guided sampler without no class": ({"eval.teacher_samplers.ode.guidance": 2.0}, f"{NET}.num_class_embeds",
                                            "eval.teacher_samplers.ode.guidance needs 11"),
        "guidance without dropout": ({"teacher.guidance": 3.0, f"{NET}.num_class_embeds": 11}, "teacher.train.label_dropout",
                                     "0, but teacher.guidance is above 1"),
        "dropout without no class": ({"teacher.train.label_dropout": 0.1}, f"{NET}.num_class_embeds", "label_dropout needs 11"),
        "time of another parameterisation": ({"generator.time": 999.0}, "generator.time", "above 80.0, the largest sigma"),
        "steps that go back": ({"generator.input": "backward_simulation", "generator.steps": 4, "generator.time": 10.0},
                               "generator.time", "10.0 is not above 17.5"),
        "lpips of four channels": (
            {**SHAPED, "data.channels": 4, f"{NET}.in_channels": 4, f"{NET}.out_channels": 4, "regression.weight": 1.0,
             "regression.distance": "lpips", "eval.detector": "lite0-320@32", "eval.metrics": ["fd"]},
            "regression.distance", "lpips compares images of 1 or 3 channels"),
        "decoder without latents": ({"regression.decoder": "vae_tiny"}, "regression.decoder", "vae_tiny decodes latents"),
        "nothing trains the student": ({"dm.weight": 0.0, "gan.lambda_g": 0.0}, "dm.weight", "nothing would train the student"),
        "nothing trains the critic": ({"critic.denoise_weight": 0.0, "gan.lambda_g": 0.0, "gan.lambda_d": 0.0},
                                      "critic.denoise_weight", "nothing would train the critic"),
        "tap of a UNet": ({"gan.tap": [1, 2]}, "gan.tap", "the teacher is no transformer: leave it out"),
        "GAN without discriminator": ({"gan.lambda_d": 0.0}, "gan.lambda_d", "the head would never be trained"),
        "VP solver for an edm teacher": ({"regression.pairs.sampler": {"solver": "ddim", "steps": 4}},
                                         "regression.pairs.sampler", "ddim cannot sample an edm teacher"),
        "VP solver of a row of the teacher": ({"eval.teacher_samplers.ode": {"solver": "ddim", "steps": 4}},
                                              "eval.teacher_samplers.ode", "ddim cannot sample an edm teacher"),
        "low-rank student of labels": ({"generator.lora": {"rank": 4, "alpha": 1.0}}, "generator.lora", "is for text runs"),
        "released without network": ({"train.released": "a.bin", "teacher.network": None, "teacher.train": None},
                                     "train.released", "the architecture of the weights in the file"),
        "shared noise of clean images": (
            {"gan.shares_noise": True, "gan.noise_range": None}, "gan.shares_noise",
            "not gan.noise_range null, dm.index_range [20, 980], critic.index_range [0, 999]"),
        "shared noise without one range": (
            {"gan.shares_noise": True, "gan.noise_range": [0, 999]}, "gan.shares_noise",
            "not gan.noise_range [0, 999], dm.index_range [20, 980], critic.index_range [0, 999]"),
        "shared noise but another range of the critic": (
            {"gan.shares_noise": True, "gan.noise_range": [20, 980], "critic.index_range": [0, 980]}, "gan.shares_noise",
            "needs one range of noise levels"),
        "betas": ({"optim.betas": [0.9, 1.5]}, "optim.betas.1", "less than 1"),
        "metric that is none": ({"eval.metrics": ["fd", "acuracy"]}, "eval.metrics", "did you mean accuracy?"),
        "metric twice": ({"eval.metrics": ["fd", "fd"]}, "eval.metrics", "fd is given twice"),
        "name of the distance": ({"eval.metrics": ["fid"]}, "eval.metrics", "is called fd"),
        "patch without patch": ({"eval.metrics": ["patch_fd"]}, "eval.metrics", "needs eval.patch"),
        "CLIP score without captions": ({"eval.metrics": ["clip_score"]}, "eval.metrics", "needs captions"),
        "accuracy without classifier": ({"eval.detector": "lite0-320@32"}, "eval.metrics", "accuracy needs labels and a"),
        "detector that is none": ({"eval.detector": "digit-classifier"}, "eval.detector", "did you mean digits-classifier?"),
        "reference as a path": ({"eval.reference": "data/refs/digits.npz"}, "eval.reference", "data/refs/NAME.npz by its NAME"),
        "images of moments": ({"eval.metrics": ["kid"], "eval.reference": "coco"}, "eval.metrics", "coco is no set of a base"),
        "geometry larger than the images": ({"eval.geometry": "patch-16"}, "eval.geometry", "there is no patch-16 in them"),
        "prompts of labels": ({"eval.prompts": "prompts.txt"}, "eval.prompts", "captions belong to data.text"),
        "more jobs than images": ({"eval.shards": 3000}, "eval.shards", "3000 jobs cannot share eval.images 2000"),
        "sampler with a hyphen": ({"eval.teacher_samplers": {"ode-18": {"solver": "heun", "steps": 18}}},
                                  "eval.teacher_samplers.ode-18", "letters, digits and _"),
        "churn nowhere": ({"eval.teacher_samplers.sde.s_min": 60.0}, "eval.teacher_samplers.sde.s_min", "above s_max 50"),
    },
    "emoji": {
        "source without captions": ({"data.source.kind": "sklearn-digits"}, "data.source.kind", "has no captions"),
        "network without captions": ({f"{NET}._class_name": "UNet2DModel"}, f"{NET}._class_name", "reads no captions"),
        "width of the text": ({f"{NET}.cross_attention_dim": 768}, f"{NET}.cross_attention_dim", "text states of 384"),
        "labels on text": ({f"{NET}.num_class_embeds": 10}, f"{NET}.num_class_embeds", "conditions on captions"),
        "channels of the latents": (
            {"data.text.pipeline.autoencoder.network.latent_channels": 8}, "data.channels", "latent_channels is 8"),
        "levels of the autoencoder": ({"data.text.pipeline.autoencoder.network.block_out_channels": [16, 32]},
                                      "data.text.pipeline.autoencoder.network.down_block_types", "3 blocks, but 2"),
        "size of the autoencoder": ({"data.text.pipeline.autoencoder.network.sample_size": 64},
                                    "data.text.pipeline.autoencoder.network.sample_size", "from 32 pixels"),
        "CLIP without images": ({"data.text.keep_images": False}, "eval.clip", "a CLIP needs captions and"),
        "reference without images": ({"data.text.keep_images": False, "eval.clip": None, "eval.metrics": ["fd"]},
                                     "eval.reference", "emoji keeps latents only"),
        "classifier of captions": ({"eval.detector": "emoji-classifier"}, "eval.detector", "has no labels"),
        "patch larger than the images": ({"eval.patch.geometry": "patch-64"}, "eval.patch.geometry", "no patch-64"),
        "weights of no later step": (
            {"gan.level_weight": True, "generator.input": "noise", "generator.steps": 1, "generator.time": 999.0},
            "gan.level_weight", "makes all images at one level"),
        "time beyond the schedule's": ({"generator.time": 1000.0}, "generator.time", "1000.0 is no step of an eps teacher"),
        "steps above the schedule's": (
            {"eval.teacher_samplers.cfg1.steps": 2000}, "eval.teacher_samplers.cfg1", "ddim takes at most 999 steps"),
    },
    "emoji-flow": {
        "weights without a head": (
            {"dm.divergence": "kl", "gan.lambda_g": 0.0, "gan.lambda_d": 0.0}, "dm.divergence", "weights images by the GAN's head"),
        "nothing to decouple": (
            {"dm.objective": "decoupled", "teacher.guidance": 1.0}, "dm.objective", "teacher.guidance is 1, none"),
        "weights of no later step": ({"gan.level_weight": True, "generator.input": "noise", "generator.steps": 1},
                                     "gan.level_weight", "makes all images at one level"),
        "one level of two terms": (
            {"dm.objective": "decoupled", "dm.renoise": "constrained", "gan.shares_noise": True,
             "dm.index_range": [0, 999], "critic.index_range": [0, 999], "gan.noise_range": [0, 999]},
            "dm.renoise", "judges all levels"),
        "ratio of a hinge loss": ({"dm.divergence": "kl", "gan.loss": "hinge"}, "dm.divergence", "write logistic"),
        "alpha of another objective": ({"dm.objective": "decoupled", "dm.alpha_factor": True}, "dm", "alpha_factor True is of objective dmd"),
        "no level within a step": ({"generator.isg": 1.0, "generator.isg_margin": 200}, "generator", "leaves no level within a step"),
        "moments of nothing": ({"dm.moments_kl": 1.0}, "dm", "moments_kl needs moments"),
        "width of the text": ({f"{NET}.joint_attention_dim": 768}, f"{NET}.joint_attention_dim", "text states of 384"),
        "pooled text": ({f"{NET}.pooled_projection_dim": 768}, f"{NET}.pooled_projection_dim", "text states of 384"),
        "guidance told to no embedder": ({"teacher.guidance_embed": 1.0}, "teacher.guidance_embed", "no guidance embedder"),
        "positions": ({f"{NET}.pos_embed_max_size": 3}, f"{NET}.pos_embed_max_size", "there are 4 tokens along a side"),
    },
    "cifar10": {
        "levels of one alpha": ({"gan.level_weight": True}, "gan.level_weight", "alpha is 1 at all levels"),
        "groups of SongUNet": ({f"{NET}.block_out_channels": [250] * 3}, f"{NET}.block_out_channels", "width 250"),
        "FID by another name": ({"eval.metrics": ["fd"]}, "eval.metrics", "fd with detector inception-2015-12-05 is called fid"),
        "network of another set": ({"data.resolution": 64}, "data.resolution", "64, but the images of cifar10 have 32"),
    },
    "fashion-tiny": {  # 28 is not padded then, and 28 / 2 / 2 is no side that the head can halve to 4
        "bottleneck of the head": (
            {"data.resolution": 28, f"{NET}.sample_size": 28, f"{NET}.block_out_channels": [8, 16, 32],
             f"{NET}.down_block_types": ["DownBlock2D"] * 3, f"{NET}.up_block_types": ["UpBlock2D"] * 3},
            "gan.lambda_g", "3 levels leave 7"),
    },
}  # fmt: skip
CASES = [(base, name) for base, cases in WRONG.items() for name in cases]


def shipped(base: str) -> dict[str, Any]:
    return read_base(base, ROOT / "workflow/base")[0]


def write(folder: Folder, name: str, base: str, changes: dict[str, Any]) -> None:
    values = tiny.put(shipped(base), changes)
    folder.base(name, values)
    folder.table(name, title="t", base=name, rows=[{"run": "a"}], metrics=[values["eval"]["metrics"][0]])


def place(folder: Folder, name: str, key: str) -> str:
    """``file:line`` of a key of a base, or of its nearest parent there."""
    path = [int(part) if part.isdigit() else part for part in key.split(".")]
    return read_yaml(folder.bases / f"{name}.yaml")[1].where(*path)


@pytest.mark.parametrize(("base", "name"), CASES, ids=[f"{base}: {name}" for base, name in CASES])
def test_what_does_not_fit_is_told_with_file_line_and_key(folder, base: str, name: str) -> None:
    changes, key, part = WRONG[base][name]
    write(folder, base, base, changes)
    error = folder.error()
    assert error.startswith(tuple(f"{place(folder, base, key)}: {key}{end}" for end in ": ,")) and part in error, error


def test_base_that_no_table_uses_is_checked_too(folder) -> None:
    folder.base("alone", tiny.put(shipped("digits"), {"gan.lambda_d": 0.0}))
    with pytest.raises(UserError, match=r"alone\.yaml:\d+: gan\.lambda_d is 0 .* never be trained"):
        load_base("alone", folder.bases)


OTHER = {"data.name": "colour", "data.source": {"kind": "latents"}, "data.resolution": 16, f"{NET}.sample_size": 16,
         "data.channels": 3, f"{NET}.in_channels": 3, f"{NET}.out_channels": 3, "teacher.name": "colour"}  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "part"), [
    ({"eval.detector": "lite0-320@32", "eval.metrics": ["fd"]}, "eval.reference",
     "images of digits are 1x8x8, 10 classes, those of colour 3x16x16, 10 classes: compare with a set of that shape"),
    ({"eval.reference": "colour"}, "eval.detector",
     "digits-classifier takes images of digits (1x8x8, 10 classes), and those of colour are others"),
], ids=["reference", "detector"])  # fmt: skip
def test_reference_and_classifier_of_another_set_are_refused(folder, changes, key, part) -> None:
    write(folder, "digits", "digits", {})
    write(folder, "colour", "digits", {**OTHER, **changes})
    error = folder.error()
    assert error.startswith(f"{place(folder, 'colour', key)}: {key}: ") and part in error


def test_a_geometry_that_makes_sizes_equal_allows_a_reference_of_another_size(folder) -> None:
    large = {key: value for key, value in OTHER.items() if "channels" not in key}
    measured = {"eval.detector": "lite0-320@32", "eval.metrics": ["fd"], "eval.geometry": "square-crop+lanczos-16"}
    write(folder, "digits", "digits", {})
    write(folder, "colour", "digits", {**large, **measured})
    folder.load()


def test_what_does_not_fit_in_a_row_is_blamed_on_the_row(folder) -> None:
    write(folder, "digits", "digits", {})
    rows = [{"run": "a"}, {"run": "b", "change": {"teacher.guidance": 2.0}}]
    folder.table("digits", title="t", base="digits", rows=rows)
    line = read_yaml(folder.tables / "digits.yaml")[1].where("rows", 1, "change", "teacher.guidance")
    assert folder.error().startswith(f"{line}: row b: teacher.network.num_class_embeds: num_class_embeds is 10, but")


# What is written down here without torch is what torch's side has.
@pytest.mark.parametrize("trained_by", [{"generator.isg": 0.5}, {"dm.moments_kl": 1.0, "dm.moments": [0.0, 1.0]}])
def test_a_student_is_trained_by_any_of_its_terms(folder, trained_by: dict[str, Any]) -> None:
    off = {"dm.weight": 0.0, "gan.lambda_g": 0.0, "gan.lambda_d": 0.0}
    folder.base("alone", tiny.put(shipped("digits"), off | trained_by))
    assert load_base("alone", folder.bases).dm.weight == 0


def test_the_checks_import_no_torch() -> None:
    code = "import sys, dmd2.experiment.tables as a; a.load_experiment(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_detectors_are_those_that_there_are() -> None:
    checked = set(networks()) - {name for name in networks() if name.startswith("clip-")}
    assert checked == set(NETWORKS)


@pytest.mark.parametrize("steps", [2, 4, 7])
def test_the_second_time_is_that_of_the_schedule(steps: int) -> None:
    assert second_time(steps, "edm") == pytest.approx(KarrasSchedule().step_times(steps, 80.0)[1], rel=1e-5)
    assert second_time(steps, "eps") == VPSchedule().step_times(steps, 999)[1]
    assert second_time(steps, "flow", 3.0) == pytest.approx(FlowSchedule(3.0).step_times(steps, 1.0)[1])


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "SongUNet"])
def test_arguments_and_defaults_are_those_of_the_class(kind: str) -> None:
    signature = inspect.signature(teachers.NETWORKS[kind].__init__).parameters
    assert dict(defaults(kind)) == {n: p.default for n, p in signature.items() if n != "self"}


FAILING = ["channels of the network", "levels", "too many levels", "block that is none", "groups", "fewer classes in the network",
           "head wider than a level"]  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_what_is_refused_of_a_network_does_fail(name: str) -> None:
    """Nothing that works is refused."""
    values = shipped("digits")
    for key, value in WRONG["digits"][name][0].items():
        values["teacher"]["network"][key.removeprefix(f"{NET}.")] = value
    with pytest.raises((UserError, RuntimeError, IndexError, ArithmeticError)):
        network = build_network(values["teacher"]["network"], seed=0)
        call_network(network, torch.zeros(10, 1, 8, 8), torch.ones(10), Condition(labels=torch.arange(10)))


def test_a_network_that_cannot_be_built_is_told_in_a_sentence() -> None:
    with pytest.raises(
        UserError, match=r"teacher\.network: no UNet2DModel can be built of it \(unknown time_embedding_norm"
    ):
        build_network({"resnet_time_scale_shift": "none"}, seed=0)


@pytest.mark.parametrize(("network", "told"), [
    ({"in_channels": 3, "out_channels": 3}, "in_channels is 3, but data.channels is 1"),
    ({"num_class_embeds": 7}, "num_class_embeds is 7, but data.classes is 4"),
    ({"sample_size": 64}, "sample_size is 64, but data.resolution is 8"),
])  # fmt: skip
def test_a_network_brought_along_is_checked_when_it_is_adopted(tmp_path, network, told) -> None:
    kind = tiny.KINDS["edm"]
    kind[1](**{**kind[2], **network}).save_pretrained(tmp_path / "unet")
    cfg = tiny.config("edm")
    with pytest.raises(UserError, match=told):
        adopt_teacher(cfg.teacher, tmp_path, cfg.data)
    assert not (tmp_path / "manifest.json").exists()
