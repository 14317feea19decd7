"""`SongUNet` in its roles: called, saved and loaded as a diffusers model, with a GAN head, trained, and exported."""

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from dmd2.networks.condition import Condition
from dmd2.networks.halves import encode
from dmd2.networks.song_unet import SongUNet
from dmd2.publish.diffusers_folder import export
from dmd2.training.build import build_head
from dmd2.training.sampling import student_sample
from dmd2.training.snapshot import find_snapshot
from dmd2.training.teachers import build_network, wrap
from tests import tiny
from tests.exported import run_alone, student, trained

CPU = torch.device("cpu")
VP = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "block_out_channels": (16, 24),
      "layers_per_block": 1, "attention_resolutions": (4,), "num_class_embeds": tiny.CLASSES, "noise_channels": 8,
      "embedding_channels": 32}  # fmt: skip
VE = {**VP, "embedding_type": "fourier", "noise_channels": 16, "encoder_type": "residual",
      "resample_filter": (1, 3, 3, 1)}  # fmt: skip


@pytest.fixture(params=[VP, VE], ids=["VP", "VE"])
def config(request):
    return request.param


def network(config, seed=0):
    torch.manual_seed(seed)
    made = SongUNet(**config)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def inputs(count=3):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(tiny.CLASSES, (count,), generator=g)
    return torch.randn(count, 1, 8, 8, generator=g), torch.linspace(-1, 1, count), labels


def test_a_saved_network_comes_back_whole(tmp_path, config):
    made, (x, t, labels) = network(config), inputs()
    made.save_pretrained(tmp_path, safe_serialization=True)
    back = SongUNet.from_pretrained(tmp_path, use_safetensors=True)
    assert tiny.same(tiny.weights(made), back)
    assert torch.equal(back(x, t, class_labels=labels).sample, made(x, t, class_labels=labels).sample)
    assert not any("kernel" in name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors"))


def test_one_time_serves_the_whole_batch_as_in_a_unet2dmodel(config):
    made, (x, _, labels) = network(config), inputs()
    together = made(x, torch.tensor(0.3), labels).sample
    assert torch.equal(together, made(x, torch.full((3,), 0.3), labels).sample)
    alone = torch.cat([made(x[i : i + 1], torch.tensor(0.3), labels[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_time_and_class_matter_and_a_class_is_needed(config):
    made, (x, t, labels) = network(config), inputs()
    out = made(x, t, labels).sample
    assert not torch.allclose(out, made(x, t + 0.1, labels).sample, atol=1e-4)
    assert not torch.allclose(out, made(x, t, (labels + 1) % tiny.CLASSES).sample, atol=1e-4)
    with pytest.raises(ValueError, match="class_labels"):
        made(x, t)


@pytest.mark.parametrize(
    "made",
    [
        network({**VP, "num_class_embeds": None}),
        UNet2DModel(**tiny.KINDS["edm-unlabelled"][2]).eval().requires_grad_(False),
    ],
    ids=["SongUNet", "UNet2DModel"],
)
def test_an_unconditional_network_takes_no_notice_of_labels(made):
    x, t, labels = inputs()
    denoiser = wrap(made, "edm")
    for call in (denoiser, denoiser.features):
        assert torch.equal(call(x, t.exp(), Condition(labels=labels)), call(x, t.exp(), Condition()))


def test_features_are_the_last_encoder_blocks_output_and_the_decoder_is_not_run(config):
    made, (x, t, labels) = network(config), inputs()
    seen = []
    made.encoder[-1].blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    made.middle[0].register_forward_hook(lambda *args: seen.append("middle"))
    features = encode(made, x, t, Condition(labels=labels)).bottleneck
    assert features.shape == (3, 24, 4, 4)
    assert len(seen) == 1
    assert torch.equal(features, seen[0])


@pytest.mark.parametrize("config", [VP, VE])
def test_joined_pass_decodes_the_first_samples_only(config):
    denoiser, (x, t, labels) = wrap(network(config), "edm"), inputs()
    arguments = (x, t.exp(), Condition(labels=labels))
    prediction, features = denoiser.joined(*arguments, 2)
    torch.testing.assert_close(prediction, denoiser(*arguments)[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, denoiser.features(*arguments)[2:], rtol=1e-5, atol=1e-6)


def test_the_head_fits_the_bottleneck():
    denoiser, (x, t, labels) = wrap(network(VP), "edm"), inputs()
    head = build_head(denoiser, tiny.config("edm"), 0, CPU)
    assert head(denoiser.features(x, t.exp(), Condition(labels=labels))).shape == (3, 1)


def test_a_fresh_network_starts_near_zero_and_belongs_to_its_seed(config):
    x, t, labels = inputs()
    first, again, other = (build_network({"_class_name": "SongUNet", **config}, seed) for seed in (0, 0, 1))
    assert first(x, t, labels).sample.abs().max() < 1e-3
    assert tiny.same(tiny.weights(first), again)
    assert not tiny.same(tiny.weights(first), other)


@pytest.mark.parametrize(("config", "steps"), [(VP, 1), (VE, 4), ({**VP, "num_class_embeds": None}, 1)])
def test_an_exported_student_samples_alone_with_its_module_beside_it(tmp_path, monkeypatch, config, steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny.KINDS, "edm", ("edm", SongUNet, config))
    run, out, seeds = trained("edm", steps), tmp_path / "out", list(range(9))
    export(find_snapshot(run), out)
    run_alone(out / "sample.py", ["--out", "floats.safetensors", "--batch", "4", "--seeds", *map(str, seeds)])
    ours = student_sample(*student("edm", run), seeds, CPU)
    theirs = load_file(out / "floats.safetensors")["images"]
    assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, float(ours.abs().max()))
    assert "`song_unet.py`, which defines the network" in (out / "README.md").read_text()


def test_an_unconditional_student_of_labelled_data_exports_without_labels_in_its_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny.KINDS, "edm", tiny.KINDS["edm-unlabelled"])
    export(find_snapshot(trained("edm")), tmp_path / "out")
    assert "class_labels" not in (tmp_path / "out/sample.py").read_text()
