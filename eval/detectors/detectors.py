"""Detectors by name: uint8 images ``(N, C, H, W)`` to float32 features ``(N, d)``.

A number computed on anything but the canonical Inception features is an FD of that detector, never called FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.core.errors import UserError, did_you_mean
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.precision import strict_float32
from dmd2.core.rng import Draws, stream
from dmd2.data.sets import TensorSet, load_shard, save_shard
from dmd2.experiment.run_inputs import WEIGHTS
from eval.detectors.networks import NETWORKS, FeatureNetwork, fit, provenance
from eval.detectors.small_clip import SmallClip
from eval.detectors.weights import locate

CPU = torch.device("cpu")
FEATURES = 64
TRAINING_STEPS, BATCH, LR = 800, 128, 2e-3


class Classifier(FeatureNetwork):
    """Small convolutional classifier of one dataset; the features are its 64 activations before the last layer."""

    def __init__(self, name: str, channels: int, resolution: int, classes: int) -> None:
        super().__init__(name, provenance(None, "none", resolution, "last hidden", FEATURES, name))
        del self.about["batch"]  # this one runs on the batch it is given
        self.channels = channels
        width, size = 32, resolution
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        while size > 4:
            layers += [nn.Conv2d(width, width * 2, 3, stride=2, padding=1), nn.ReLU()]
            width, size = width * 2, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, FEATURES), nn.ReLU())
        self.last = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images in grey levels; grey ones are replicated for a colour classifier."""
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        with strict_float32(self.device):
            features = self.body(images.to(self.device).float() / 127.5 - 1)
            return features, self.last(features)


def train_classifier(name: str, real: TensorSet, out: Path, device: torch.device = CPU) -> None:
    """Train the dataset's classifier with a fixed seed; every fifth image is held out to state its accuracy.

    Raises:
        UserError: the set has no labels.
    """
    if "labels" not in real.tensors:
        raise UserError(f"{name}: its set has no labels; name a network in eval.detector")
    images, labels = real.tensors["images"], real.tensors["labels"]
    held_out = torch.arange(len(images)) % 5 == 0
    shape = {"channels": images.shape[1], "resolution": images.shape[-1], "classes": int(labels.max()) + 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"0/{name}").initial_seed())
        model = Classifier(name, **shape)
    model.device = device
    model.to(device)
    train = TensorSet({"images": images[~held_out], "labels": labels[~held_out]})

    def loss(it: int) -> Tensor:
        draws = Draws(0, it, BATCH, 0, BATCH)
        rows = draws.shuffled("classifier/real", len(train))
        noisy = train.tensor("images", rows) + 12 * draws.normal("classifier/noise", tuple(images.shape[1:]))
        return F.cross_entropy(model(noisy)[1], train.tensor("labels", rows).to(device))

    fit(model.parameters(), LR, TRAINING_STEPS, loss, decay=0.05)
    with torch.no_grad():
        right = (model(images[held_out])[1].argmax(1).cpu() == labels[held_out]).float().mean()
    path = out.parent / "classifier.safetensors"
    save_shard(path, dict(model.cpu().state_dict()))
    about = {"kind": "classifier", "name": name, **shape, "held_out_accuracy": round(float(right), 4)}
    write_json(out, {**about, "files": listing([path], out.parent)})


def load_detector(name: str, weights: Path = WEIGHTS, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The detector `name`, its weights verified.

    Args:
        name: one of `NETWORKS`, ``clip-<folder of an open_clip model>``, or ``<data>-classifier``.
        weights: parent of the weights' folders.
        device: where it runs and leaves its features.

    Raises:
        UserError: unknown, or its weights are missing (nothing is downloaded here) or changed.
    """
    if name in NETWORKS:
        entry, build = NETWORKS[name]
        return build(name, locate(entry, weights)).on(device)
    if name.startswith("clip-"):
        from eval.detectors.clip import ClipImages  # open_clip: 46 MB that no other detector needs

        return ClipImages(weights / name).on(device)
    manifest = weights / name / "manifest.json"
    if not manifest.exists():
        if hint := did_you_mean(name, NETWORKS):
            raise UserError(f"there is no detector {name}{hint}")
        raise UserError(
            f"detector {name}: {manifest} is missing; a per-dataset classifier is made by its rule, the others are "
            f"{', '.join(NETWORKS)} and clip-<model folder>"
        )
    entry = read_json(manifest)
    if entry["kind"] == "clip":
        return SmallClip.load(manifest, device).images
    if entry["kind"] != "classifier":
        raise UserError(f"detector {name}: kind {entry['kind']} of {manifest} is not one this version can run")
    model = Classifier(name, entry["channels"], entry["resolution"], entry["classes"])
    model.load_state_dict(load_shard(verified(manifest.parent, entry["files"][0])))
    model.about |= {"weights": entry["files"][0]["sha256"], "verified": True}
    return model.on(device)


def record_network(name: str, out: Path) -> None:
    """Write the manifest OUT of a network whose weights exist already, so that rules can depend on it.

    Raises:
        UserError: unknown, or its weights are missing or changed.
    """
    about = load_detector(name).about
    files = [{"path": about["file"], "sha256": about["weights"]}]
    write_json(out, {"kind": "network", "name": name, **about, "files": files})
