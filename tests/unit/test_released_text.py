"""Released students of Stable Diffusion: UNets and LoRAs of their authors as runs, and as diffusers folders."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from dmd2.convert.__main__ import main
from dmd2.convert.kohya import write_kohya
from dmd2.convert.unets import convert, student_state
from dmd2.core.errors import UserError
from dmd2.core.files import read_json, sha256, write_json
from dmd2.core.provenance import Artefact
from dmd2.core.run import RunId
from dmd2.data.sets import load_shard
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import Inputs
from dmd2.launch.command import train
from dmd2.networks.lora import lora_state, merged_state
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.snapshot import find_snapshot
from tests import tiny
from tests.unit.test_lora import student

RUN, KIND = RunId("tiny", "released", 0), "eps-sdxl"
TEXT = {"pipeline": {"name": "tiny"}, "latents": True}
UNET = Path("data/teachers/tiny/unet")


@pytest.fixture
def place(root, tmp_path, monkeypatch):
    """A folder with a teacher, and the student of another seed: the network with its factors, and without."""
    (tmp_path / "workflow").symlink_to(root / "workflow")
    monkeypatch.chdir(tmp_path)
    network, base = student(KIND)
    base.save_pretrained(UNET, safe_serialization=True)
    adopt_teacher(Teacher(name="tiny", parameterisation="eps", guidance=1.0), UNET.parent)
    write_json(Path("data/pipelines/tiny/manifest.json"), {"files": []})
    write_kohya(Path("lora.safetensors"), lora_state(network), torch.float32)
    return network, base


def config(released: str):
    return tiny.config(KIND, data__text=TEXT, train__released=released)


def publish(released: str):
    train(str(RUN), json.dumps(config(released).training().settings()))
    record = read_json(RUN.folder / "train.json")
    return record, load_shard(RUN.folder / record["files"][0]["path"])


def close(found, wanted, tolerance):
    assert found.keys() == wanted.keys() and {value.dtype for value in found.values()} == {torch.float32}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_released_unet_is_read_in_all_its_forms(tmp_path, dtype, suffix):
    network = tiny.network(KIND, 3)
    state = {name: value.to(dtype) for name, value in network.state_dict().items()}
    (torch.save if suffix == ".bin" else save_file)(state, tmp_path / f"unet{suffix}")
    found = student_state(tmp_path / f"unet{suffix}", tiny.network(KIND, 0))
    close(found, {name: value.float() for name, value in state.items()}, 0.0)


def test_a_released_unet_becomes_a_run(place):
    network = tiny.network(KIND, 3)
    torch.save(network.state_dict(), "pytorch_model.bin")
    record, weights = publish("pytorch_model.bin")
    assert tiny.same(weights, network)
    assert (record["steps"], record["seconds"]) == (20, None)
    assert record["released"]["sha256"] == sha256(Path("pytorch_model.bin"))
    cfg = config("pytorch_model.bin").training()
    inputs = [str(path) for path in Inputs.of(RUN, cfg).paths()]
    assert str(UNET.parent / "manifest.json") in inputs
    assert Artefact([str(RUN.folder / "train.json")], cfg.settings(), inputs).outdated() is None


def test_a_released_lora_is_merged_onto_the_teacher(place):
    network, base = place
    record, weights = publish("lora.safetensors")
    close(weights, merged_state(network), 1e-6)
    tiny.network(KIND, 9).save_pretrained(UNET, safe_serialization=True)
    adopt_teacher(Teacher(name="tiny", parameterisation="eps", guidance=1.0), UNET.parent)
    (RUN.folder / "train.json").unlink()
    other, weights = publish("lora.safetensors")
    assert other["key"] != record["key"]
    assert not torch.equal(weights["conv_in.weight"], base.state_dict()["conv_in.weight"])


def test_a_lora_is_merged_in_float32_onto_a_base_in_half_precision(place):
    network, base = place
    base.half().save_pretrained("half", safe_serialization=True)
    found = student_state(Path("lora.safetensors"), UNet2DConditionModel.from_config(base.config), Path("half"))
    close(found, merged_state(network), 1e-3)


def test_a_changed_teacher_is_told(place):
    weights = UNET / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit, match="does not match the checksum"):
        publish("lora.safetensors")
    assert not (RUN.folder / "train.json").exists()


def test_files_that_do_not_fit_are_told(place):
    network, base = place
    with pytest.raises(UserError, match="is a LoRA: it needs the weights that it is for"):
        student_state(Path("lora.safetensors"), base)
    torch.save(network.state_dict(), "checkpoint.bin")
    with pytest.raises(UserError, match="checkpoint of a LoRA training"):
        student_state(Path("checkpoint.bin"), base, UNET)
    torch.save(tiny.network("eps-text", 0).state_dict(), "other.bin")
    with pytest.raises(UserError, match="other.bin: add_embedding.linear_1.bias is missing"):
        student_state(Path("other.bin"), base)
    write_json(UNET / "config.json", {"_class_name": "UNet2DModel"})
    with pytest.raises(UserError, match="is of a UNet2DModel and no UNet2DConditionModel"):
        convert(Path("lora.safetensors"), Path("folder"), UNET)


def test_the_command_that_is_told_instead_of_an_export_makes_a_folder(place, capsys):
    network, base = place
    publish("lora.safetensors")
    with pytest.raises(UserError) as told:
        find_snapshot(RUN)
    words = str(told.value).partition("dmd2 convert ")[2].split()
    assert words == ["lora.safetensors", "FOLDER", "--base", str(UNET)]
    main(Path(words[0]), Path(words[1]), None, Path(words[3]))
    count = sum(p.numel() for p in base.parameters())
    assert f"FOLDER: UNet2DConditionModel, {count:,} parameters, sha256" in capsys.readouterr().out
    made = UNet2DConditionModel.from_pretrained("FOLDER", use_safetensors=True)
    close(made.state_dict(), merged_state(network), 1e-6)
    convert(Path("lora.safetensors"), Path("FOLDER"), UNET)  # replaces an earlier conversion
