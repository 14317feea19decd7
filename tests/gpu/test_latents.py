"""What stands around a latent network on the device: text encoders, autoencoders and LPIPS, with the CPU's numbers."""

from pathlib import Path

import pytest
import torch

from dmd2.data.pipelines import Pipeline
from dmd2.experiment.data_config import Autoencoder
from dmd2.method.step import brightness
from dmd2.networks.autoencoder import train_autoencoder
from dmd2.networks.lpips import Lpips
from dmd2.training.build import regression_distance
from tests import tiny, tiny_pipelines
from tests.unit.test_lpips import write_weights

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
SIDE = tiny_pipelines.LATENTS * tiny_pipelines.FACTOR
KINDS = {"sd15": tiny_pipelines.sd15, "sdxl": tiny_pipelines.sdxl}


def pipeline_on(device: torch.device, kind: str) -> Pipeline:
    """A tiny pipeline whose parts run on the device."""
    folder = KINDS[kind](Path(kind))
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return Pipeline(folder, [{"path": str(file)} for file in files], device)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without checksums are taken as they are."""
    monkeypatch.setattr("dmd2.data.pipelines.verified", lambda folder, entry: folder / entry["path"])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_on_the_cpu(kind: str, device: torch.device, place: Path) -> None:
    prompts = ["a red house", "two dog", ""]
    ours, theirs = (pipeline_on(where, kind).encode_prompts(prompts) for where in (device, CPU))
    for name in ("text", "pooled"):
        if getattr(theirs, name) is not None:
            assert getattr(ours, name).device == device
            torch.testing.assert_close(getattr(ours, name).cpu(), getattr(theirs, name), **CLOSE)
    pipeline_on(device, kind).unconditional()


@pytest.mark.parametrize("kind", KINDS)
def test_images_become_latents_and_images_as_on_the_cpu(kind: str, device: torch.device, place: Path) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    noise = torch.randn(3, 4, tiny_pipelines.LATENTS, tiny_pipelines.LATENTS, generator=g)
    (ours, there), (theirs, here) = ((pipeline_on(where, kind), where) for where in (device, CPU))
    latents = ours.encode_images(images, noise)
    assert latents.device == there
    torch.testing.assert_close(latents.cpu(), theirs.encode_images(images, noise), **CLOSE)
    for decoder in ("vae", "vae_tiny")[: 1 if kind == "sd15" else 2]:
        decoded = ours.decode(latents, decoder)
        assert decoded.device == there and brightness(decoded).device == there
        torch.testing.assert_close(decoded.cpu(), theirs.decode(latents.cpu(), decoder), **CLOSE)


def test_an_autoencoder_is_trained(device: torch.device, place: Path) -> None:
    network = {**tiny_pipelines.VAE, "latent_channels": 4}
    train = {"steps": 2, "batch": 4, "lr": 1e-3, "kl": 1e-6, "seed": 0}
    images = torch.randint(256, (8, 3, SIDE, SIDE), dtype=torch.uint8)
    spec = Autoencoder.model_validate({"network": network, "train": train})
    assert train_autoencoder(spec, images, Path("vae"), device)["steps"] == 2
    assert (place / "vae/config.json").exists()


def test_distances_of_the_regression_are_those_of_the_cpu(device: torch.device, place: Path, monkeypatch) -> None:
    write_weights(place / "data/weights")
    g = torch.Generator().manual_seed(0)
    x, target = (torch.rand(2, 3, 32, 32, generator=g) * 2 - 1 for _ in range(2))
    for kind in ("l2", "lpips"):
        cfg = tiny.config("edm", regression__weight=1.0, regression__distance=kind)
        ours, theirs = (regression_distance(cfg, where)(x.to(where), target.to(where)) for where in (device, CPU))
        assert ours.device == device
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-5)
    assert Lpips().to(device)(x.to(device), target.to(device)).device == device
