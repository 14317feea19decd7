"""The autoencoder that is trained here."""

from pathlib import Path

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Autoencoder
from dmd2.networks.autoencoder import train_autoencoder

NETWORK = {
    "block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip


def test_one_that_diverged_is_not_saved(tmp_path: Path) -> None:
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = {"steps": 5, "batch": 4, "lr": 1e30, "kl": 1e-4}
    spec = Autoencoder.model_validate({"network": NETWORK, "train": train})
    with pytest.raises(UserError, match=r"the autoencoder diverged.*lower autoencoder\.train\.lr"):
        train_autoencoder(spec, images, tmp_path / "vae", torch.device("cpu"))
    assert not (tmp_path / "vae").exists()
