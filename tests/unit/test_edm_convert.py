"""EDM's networks as diffusers folders and back: equal outputs and equal bits, and what is said of files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from typer import Typer
from typer.testing import CliRunner

from dmd2.convert.__main__ import main
from dmd2.convert.edm_names import empty, from_edm, infer
from dmd2.convert.unets import convert, export_edm, student_state
from dmd2.core.errors import UserError
from dmd2.core.files import sha256
from dmd2.networks.condition import Condition
from dmd2.training.teachers import NETWORKS, wrap
from tests import edm_reference as edm
from tests import tiny

FULL_ADM = {**edm.ADM, "size": 64, "width": 192, "mult": [1, 2, 3, 4], "layers": 3, "attention": [32, 16, 8],
            "labels": 1000, "noise": 192}  # fmt: skip
CIFAR = {"size": 32, "width": 128, "mult": [2, 2, 2], "layers": 4, "attention": [16], "labels": 10}
NETS = {
    "adm-cond": edm.ADM, "adm-uncond": {**edm.ADM, "labels": 0},
    "adm-three-levels": {**edm.ADM, "size": 16, "mult": [1, 1, 2], "layers": 2, "attention": [16, 4], "labels": 3},
    "vp-cond": edm.VP, "vp-uncond": {**edm.VP, "labels": 0}, "ve-cond": edm.VE, "ve-uncond": {**edm.VE, "labels": 0},
    "ve-three-levels": {**edm.VE, "size": 16, "mult": [1, 2, 3], "layers": 2, "attention": [16, 4]},
}  # fmt: skip
SIGMAS = torch.tensor([0.002, 0.1, 1.0, 80.0])


def loaded(folder):
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return NETWORKS[kind].from_pretrained(folder, use_safetensors=True).eval()


def inputs(spec, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, spec["size"], spec["size"], generator=g) * (SIGMAS**2 + 0.25).sqrt()[:, None, None, None]
    labels = torch.randint(spec["labels"] or 1, (4,), generator=g)
    return x, labels, torch.nn.functional.one_hot(labels, spec["labels"]).float() if spec["labels"] else None


def test_the_augmentation_layer_is_left_out_and_that_is_said(tmp_path, capsys):
    convert(edm.write(tmp_path / "net.pkl", edm.VP, edm.random_state(edm.VP, augment=9)), tmp_path / "out")
    assert "map_augment.weight is left out" in capsys.readouterr().err
    convert(edm.write(tmp_path / "net.pkl", edm.VP, edm.random_state(edm.VP)), tmp_path / "out")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", NETS)
def test_a_converted_network_denoises_as_edm_and_goes_back_bit_by_bit(tmp_path, name):
    spec, augment = NETS[name], 0 if "adm" in name else 9
    state = edm.random_state(spec, augment=augment)
    denoiser = wrap(loaded(convert(edm.write(tmp_path / "net.pkl", spec, state), tmp_path / "out")), "edm")
    reference, (x, labels, one_hot) = edm.Network(spec, state), inputs(spec)
    expected = edm.denoised(reference, x, SIGMAS, one_hot)
    with torch.no_grad():
        assert (denoiser(x, SIGMAS, Condition(labels=labels)) - expected).abs().max() < 1e-5
        features = denoiser.features(x, SIGMAS, Condition(labels=labels))
    torch.testing.assert_close(features, reference.encoded, rtol=1e-4, atol=1e-5)
    back = load_file(export_edm(tmp_path / "out", tmp_path / "back.safetensors"))
    wanted = {key: value for key, value in state.items() if "map_augment" not in key}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["adm-cond", "ve-cond"])
def test_the_released_forms_give_the_same_folder(tmp_path, name):
    spec = NETS[name]
    state = edm.random_state(spec)
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_file(state, tmp_path / "net.safetensors")
    save_file({key.removeprefix("model."): value for key, value in state.items()}, tmp_path / "bare.safetensors")
    first = convert(edm.write(tmp_path / "net.pkl", spec, state), tmp_path / "net")
    for file in ("pytorch_model.bin", "net.safetensors", "bare.safetensors"):
        out = convert(tmp_path / file, tmp_path / "other")
        assert out == tmp_path / "other"
        assert [sha256(f) for f in sorted(out.iterdir())] == [sha256(f) for f in sorted(first.iterdir())]
    network = loaded(first)
    student = student_state(tmp_path / "pytorch_model.bin", network)
    assert tiny.same(student, network)
    assert student.keys() == network.state_dict().keys()


def test_a_checkpoint_with_our_own_names_is_taken_as_it_is(tmp_path):
    network = UNet2DConditionModel(**tiny.KINDS["eps-text"][2])
    torch.save({key: value.half() for key, value in network.state_dict().items()}, tmp_path / "pytorch_model.bin")
    student = student_state(tmp_path / "pytorch_model.bin", network)
    assert {value.dtype for value in student.values()} == {torch.float32}
    network.load_state_dict(student)
    with pytest.raises(UserError, match=r"pytorch_model.bin: .* does not belong to a UNet2DConditionModel"):
        torch.save({**network.state_dict(), "a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
        student_state(tmp_path / "pytorch_model.bin", network)


def counts(spec):
    shapes = edm.Shapes(spec)
    buffers = ("resample_filter", "freqs")
    return len(shapes), sum(torch.Size(s).numel() for name, s in shapes.items() if not name.endswith(buffers))


@pytest.mark.parametrize(
    ("spec", "entries", "parameters", "base"),
    [
        (FULL_ADM, 553, 295_899_267, "imagenet64"),
        ({**edm.VP, **CIFAR, "noise": 128}, 426, 55_734_147, "cifar10"),
        ({**edm.VP, **CIFAR, "noise": 128, "labels": 0}, 424, 55_732_739, None),
        ({**edm.VE, **CIFAR, "noise": 256}, 433, 56_398_339, None),
        ({**edm.VE, **CIFAR, "noise": 256, "labels": 0}, 431, 56_395_523, None),
    ],
)
def test_the_published_shapes_are_recognised(spec, entries, parameters, base):
    assert counts(spec) == (entries, parameters)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in edm.Shapes(spec).items()}
    config = infer(state, Path("net.pkl"))
    network = empty(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum("resample_filter" in name for name in state) == {"UNet2DModel": 12}.get(config["_class_name"], len(
        [name for name in state if "_down.conv1.weight" in name or "_up.conv1.weight" in name]
    ) * 2 + 2 * bool(spec.get("residual")))  # fmt: skip
    if base:
        wanted = yaml.safe_load(Path(f"workflow/base/{base}.yaml").read_text())["teacher"]["network"]
        assert config == {"_class_name": "UNet2DModel", **wanted}


def damaged(tmp_path, change, spec=edm.VP, **options):
    state = edm.random_state(spec)
    change(state)
    source = edm.write(tmp_path / "net.pkl", spec, state, **options)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert str(caught.value).startswith(str(source))
    return str(caught.value)


BLOCK = "model.enc.8x8_block0"


@pytest.mark.parametrize("spec", [edm.VP, edm.ADM])
@pytest.mark.parametrize(
    "name", [f"{BLOCK}.conv1.bias", f"{BLOCK}.conv0.weight", "model.enc.8x8_conv.weight", "model.map_layer0.weight",
             "model.enc.4x4_block0.qkv.weight", "model.dec.4x4_in0.proj.bias", "model.enc.4x4_down.skip.resample_filter"]
)  # fmt: skip
def test_a_missing_parameter_is_named(tmp_path, name, spec):
    said = damaged(tmp_path, lambda state: state.pop(name), spec)
    assert f"{name.removeprefix('model.')} is missing" in said


def test_superfluous_and_mis_shaped_parameters_are_named(tmp_path):
    said = damaged(tmp_path, lambda state: state.update({f"{BLOCK}.conv9.weight": torch.ones(1)}))
    assert "enc.8x8_block0.conv9.weight does not belong to a SongUNet" in said
    said = damaged(tmp_path, lambda state: state.update({f"{BLOCK}.conv1.weight": torch.ones(16, 16, 1, 1)}))
    assert "enc.8x8_block0.conv1.weight has shape (16, 16, 1, 1) instead of (32, 32, 3, 3)" in said
    said = damaged(tmp_path, lambda state: state.update({f"{BLOCK}.conv0.weight": torch.ones(16)}))
    assert "enc.8x8_block0.conv0.weight has 1 axes instead of 4" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(tmp_path, value):
    said = damaged(tmp_path, lambda state: state[f"{BLOCK}.conv1.bias"].view(-1)[3:4].fill_(value))
    assert f"{BLOCK}.conv1.bias has NaN or infinite values" in said


def test_another_filter_and_another_type_of_number_are_named(tmp_path):
    said = damaged(tmp_path, lambda state: state["model.enc.4x4_down.skip.resample_filter"].mul_(1.1))
    assert "enc.4x4_down.skip.resample_filter is not the filter [1, 1]" in said
    said = damaged(tmp_path, lambda state: state.update({f"{BLOCK}.conv1.bias": torch.zeros(32).double()}))
    assert "has dtype float64" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [({"label_dim": 6}, "ema.label_dim is 6"), ({"img_resolution": 16}, "ema.img_resolution is 16"),
     ({"img_resolution": "8"}, "ema.img_resolution is 8 but"), ({"label_dim": [[]]}, "ema.label_dim is list"),
     ({"img_channels": 1}, "ema.img_channels is 1")],
)  # fmt: skip
def test_settings_that_contradict_the_tensors_are_named(tmp_path, options, said):
    assert said in damaged(tmp_path, lambda state: None, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 64, "noise": 64}, "a level of 64 channels cannot be a UNet2DModel"),
        ({"width": 144, "noise": 144}, "a level of 144 channels cannot be a UNet2DModel"),
        ({"width": 160, "noise": 160, "mult": [1, 1]}, "attention over 160 channels cannot be a UNet2DModel"),
        ({"noise": 64}, "a time embedding of 64 and 512 channels cannot be a UNet2DModel"),
        ({"mult": [2, 2]}, "a time embedding of 128 and 512 channels cannot be a UNet2DModel"),
    ],
)
def test_an_adm_that_diffusers_cannot_express_is_told(tmp_path, change, said):
    spec = {**edm.ADM, **change}
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in edm.Shapes(spec).items()}
    if "mult" in change and change["mult"] == [2, 2]:
        state["enc.8x8_conv.weight"] = torch.empty(256, 3, 3, 3, device="meta")
    with pytest.raises(UserError, match=said):
        infer(state, tmp_path)


def test_files_of_other_kinds_are_told(tmp_path):
    def said(name, data):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            convert(tmp_path / name, tmp_path / "out")
        return str(caught.value)

    assert "no suffix that says" in said("net.npz", b"x")
    assert "truncated or no plain state dict" in said("a.bin", b"x" * 99)
    assert "truncated or no safetensors file" in said("a.safetensors", b"x" * 99)
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    assert "does not hold a network of EDM" in said("b.safetensors", (tmp_path / "b.safetensors").read_bytes())
    torch.save([1], tmp_path / "b.bin")
    assert "holds a list and no state dict" in said("b.bin", (tmp_path / "b.bin").read_bytes())
    torch.save({"a": 1}, tmp_path / "b.bin")
    assert "a is a int and no plain tensor" in said("b.bin", (tmp_path / "b.bin").read_bytes())
    torch.save({"a": UserError}, tmp_path / "b.bin")
    assert "would run dmd2.core.errors.UserError: refused" in said("b.bin", (tmp_path / "b.bin").read_bytes())
    with pytest.raises(UserError, match="absent.pkl is missing"):
        convert(tmp_path / "absent.pkl", tmp_path / "out")
    with pytest.raises(UserError, match="is no file"):
        convert(tmp_path, tmp_path / "out")


def test_only_an_earlier_conversion_is_replaced(tmp_path):
    source = edm.write(tmp_path / "net.pkl", edm.VP, edm.random_state(edm.VP))
    convert(source, convert(source, tmp_path / "out"))
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no network folder"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pkl", "out"]


def test_a_network_that_edm_lacks_does_not_go_back(tmp_path):
    UNet2DModel(**tiny.KINDS["edm"][2]).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"tiny: \S+ has no counterpart in EDM"):
        export_edm(tmp_path / "tiny", tmp_path / "x.safetensors")
    UNet2DConditionModel(**tiny.KINDS["eps-text"][2]).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="EDM has no UNet2DConditionModel"):
        export_edm(tmp_path / "text", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no whole diffusers folder"):
        export_edm(tmp_path / "absent", tmp_path / "x.safetensors")
    out = convert(edm.write(tmp_path / "net.pkl", edm.ADM, edm.random_state(edm.ADM)), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(UserError, match="act_fn is gelu, in a network that EDM has it would be silu"):
        export_edm(out, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_command_converts_both_ways_and_says_what_it_wrote(tmp_path):
    app = Typer()
    app.command()(main)
    source, out, back = tmp_path / "net.pkl", tmp_path / "out", tmp_path / "back.safetensors"
    edm.write(source, edm.VP, edm.random_state(edm.VP))
    result = CliRunner().invoke(app, [str(source), str(out)])
    count = sum(parameter.numel() for parameter in loaded(out).parameters())
    digest = sha256(out / "diffusion_pytorch_model.safetensors")
    assert result.output.strip() == f"{out}: SongUNet, {count:,} parameters, sha256 {digest}"
    result = CliRunner().invoke(app, [str(out), "--to-edm", str(back)])
    assert result.output.strip() == f"{back}: SongUNet, {count:,} parameters, sha256 {sha256(back)}"
    assert CliRunner().invoke(app, [str(source)]).exit_code == 1
    assert "not both" in str(CliRunner().invoke(app, [str(source), str(out), "--to-edm", str(back)]).exception)


def test_a_student_must_be_of_our_networks_shape(tmp_path):
    state = edm.random_state(edm.VP)
    torch.save(state, tmp_path / "pytorch_model.bin")
    other = empty(
        infer({k.removeprefix("model."): v for k, v in edm.random_state(NETS["vp-uncond"]).items()}, tmp_path)
    )
    with pytest.raises(UserError, match=r"map_label.bias does not belong to a SongUNet of its settings \(and 1 more\)"):
        student_state(tmp_path / "pytorch_model.bin", other)
    with pytest.raises(UserError, match="is missing"):
        from_edm({}, other, tmp_path)
