"""Networks of others: a teacher converted from NVlabs' file, and a released student that becomes a measured run."""

import json

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, sha256
from dmd2.core.provenance import Artefact
from dmd2.core.rng import sample_labels, sample_noise
from dmd2.core.run import RunId
from dmd2.data.sets import load_shard
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import measured_with
from dmd2.launch.command import train
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.snapshot import find_snapshot
from eval.runs.evaluate import brightness_stability, student_of
from tests import edm_reference as edm
from tests import tiny

SPEC = {**edm.ADM, "labels": 4}
NETWORK = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [128, 256],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "num_class_embeds": 4,
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "downsample_type": "resnet",
    "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 64,
    "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
}  # fmt: skip
RUN = RunId("tiny", "released", 0)


@pytest.fixture
def place(root, tmp_path, monkeypatch):
    (tmp_path / "workflow").symlink_to(root / "workflow")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes):
    values = {"data__channels": 3, "teacher__network": NETWORK, "train__released": "student.bin"} | changes
    return tiny.config("edm", **values)


def release(state, name="student.bin"):
    """The authors' file: a state dict with EDM's names, as torch.save writes it."""
    torch.save({f"model.{key.removeprefix('model.')}": value for key, value in state.items()}, name)


def publish(cfg):
    train(str(RUN), json.dumps(cfg.training().settings()))
    return read_json(RUN.folder / "train.json")


def test_a_released_student_is_a_run_without_a_training(place):
    release(edm.random_state(SPEC))
    cfg = config()
    record = publish(cfg)
    assert (record["steps"], record["student_updates"], record["seconds"], record["cost"]) == (20, 4, None, {})
    assert record["released"] == {"path": "student.bin", "sha256": sha256(place / "student.bin")}
    made = Artefact([str(RUN.folder / "train.json")], cfg.training().settings(), [])
    assert made.outdated() is None
    assert brightness_stability(RUN, record) == {}
    assert "teacher" not in measured_with(cfg) and not cfg.needs_real


def test_student_updates_follow_the_turns_of_its_training(place):
    release(edm.random_state(SPEC))
    assert publish(config(critic__ratio=6, critic__shares_iteration=False))["student_updates"] == 20 // 6


def test_it_makes_the_images_of_edms_network(place):
    state = edm.random_state(SPEC)
    release(state)
    cfg = config()
    publish(cfg)
    students = student_of(RUN, cfg, torch.device("cpu"))
    [(step, _)] = students.snapshots()
    seeds = [0, 1, 2]
    one_hot = torch.nn.functional.one_hot(sample_labels(seeds, 4, "cyclic"), 4).float()
    z = 80.0 * sample_noise(seeds, (3, 8, 8), "noise")
    expected = edm.denoised(edm.Network(SPEC, state), z, torch.full((3,), 80.0), one_hot)
    assert step == 20
    torch.testing.assert_close(students(seeds), expected, rtol=1e-4, atol=1e-5)


def test_another_file_makes_another_snapshot(place):
    release(edm.random_state(SPEC))
    first = publish(config())
    release(edm.random_state(SPEC, seed=1))
    second = publish(config())
    assert first["key"] != second["key"]
    weights = [load_shard(RUN.folder / record["files"][0]["path"])["conv_in.weight"] for record in (first, second)]
    assert not torch.equal(*weights)


def test_a_missing_or_other_file_is_told(place):
    with pytest.raises(SystemExit, match=r"train\.released: student\.bin is not there"):
        publish(config())
    release(edm.random_state({**SPEC, "labels": 3}))
    with pytest.raises(SystemExit, match=r"student\.bin: .*map_label"):
        publish(config())
    assert not (RUN.folder / "train.json").exists()


def test_it_is_not_ours_to_publish(place):
    release(edm.random_state(SPEC))
    publish(config())
    with pytest.raises(UserError, match=r"dmd2 convert student\.bin"):
        find_snapshot(RUN)


def teacher(**settings):
    return Teacher(name="t", parameterisation="edm", guidance=1.0, source="net.pkl", **settings)


def test_a_teacher_is_converted_from_its_source(place):
    edm.write(place / "net.pkl", SPEC, edm.random_state(SPEC))
    entry = read_json(adopt_teacher(teacher(network=NETWORK), place / "t"))
    assert (entry["class"], entry["source"]["sha256"]) == ("UNet2DModel", sha256(place / "net.pkl"))
    (place / "net.pkl").unlink()  # what is converted is not converted again
    assert read_json(adopt_teacher(teacher(network=NETWORK), place / "t"))["files"] == entry["files"]


def test_another_source_is_converted_again(place):
    edm.write(place / "net.pkl", SPEC, edm.random_state(SPEC))
    first = read_json(adopt_teacher(teacher(), place / "t"))
    edm.write(place / "net.pkl", SPEC, edm.random_state(SPEC, seed=1))
    second = read_json(adopt_teacher(teacher(), place / "t"))
    assert second["source"]["sha256"] == sha256(place / "net.pkl") != first["source"]["sha256"]
    assert second["files"] != first["files"]
    elsewhere = Teacher(name="t", parameterisation="edm", guidance=1.0, source="other.pkl")
    with pytest.raises(UserError, match=r"t/unet was converted from net\.pkl, teacher\.source says other\.pkl"):
        adopt_teacher(elsewhere, place / "t")


def test_a_teacher_of_another_architecture_is_told(place):
    edm.write(place / "net.pkl", SPEC, edm.random_state(SPEC))
    with pytest.raises(UserError, match=r"has num_class_embeds 4, teacher\.network says 10"):
        adopt_teacher(teacher(network={**NETWORK, "num_class_embeds": 10}), place / "t")


def test_a_teacher_without_its_file_is_told_where_to_put_it(place):
    with pytest.raises(UserError, match=r"at t/unet, or net\.pkl at net\.pkl"):
        adopt_teacher(teacher(), place.relative_to(place) / "t")
