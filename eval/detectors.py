"""Detectors by name: uint8 images ``(N, C, H, W)`` to float32 features ``(N, d)``.

A number computed on anything but the canonical Inception features is an FD of that detector, never called FID.
"""

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from dmd2.data import TensorSet, load_set, load_shard, save_shard
from dmd2.errors import UserError, readable_errors
from dmd2.files import listing, read_json, verified, write_json
from dmd2.rng import Draws, stream
from eval.stats import FeatureStats, save_stats

WEIGHTS = Path("data/weights")
FEATURES = 64
TRAINING_STEPS, BATCH, LR = 800, 128, 2e-3


class Detector(Protocol):
    """What every metric is given."""

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(N, d)`` and, for a classifier, class logits ``(N, classes)``."""
        ...


class Classifier(nn.Module):
    """Small convolutional classifier of one dataset; the features are its 64 activations before the last layer."""

    def __init__(self, name: str, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.name = name
        width, size = 32, resolution
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        while size > 4:
            layers += [nn.Conv2d(width, width * 2, 3, stride=2, padding=1), nn.ReLU()]
            width, size = width * 2, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, FEATURES), nn.ReLU())
        self.last = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of uint8 images."""
        features = self.body(images.float() / 127.5 - 1)
        return features, self.last(features)


def train_classifier(name: str, real: TensorSet, out: Path) -> None:
    """Train the dataset's classifier with a fixed seed; every fifth image is held out to state its accuracy."""
    images, labels = real.tensors["images"], real.tensors["labels"]
    held_out = torch.arange(len(images)) % 5 == 0
    shape = {"channels": images.shape[1], "resolution": images.shape[-1], "classes": int(labels.max()) + 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"0/{name}").initial_seed())
        model = Classifier(name, **shape)
    train = TensorSet({"images": images[~held_out], "labels": labels[~held_out]})
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=TRAINING_STEPS)
    for it in range(TRAINING_STEPS):
        draws = Draws(0, it, BATCH, 0, BATCH)
        rows = draws.shuffled("classifier/real", len(train))
        noisy = train.tensor("images", rows) + 12 * draws.normal("classifier/noise", tuple(images.shape[1:]))
        loss = F.cross_entropy(model(noisy)[1], train.tensor("labels", rows))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        right = (model(images[held_out])[1].argmax(1) == labels[held_out]).float().mean()
    path = out.parent / "classifier.safetensors"
    save_shard(path, dict(model.state_dict()))
    about = {"kind": "classifier", "name": name, **shape, "held_out_accuracy": round(float(right), 4)}
    write_json(out, {**about, "files": listing([path], out.parent)})


def load_detector(name: str, weights: Path = WEIGHTS) -> Detector:
    """The detector `name`, its weights verified.

    Raises:
        UserError: unknown, or its weights are missing (nothing is downloaded here) or changed.
    """
    manifest = weights / name / "manifest.json"
    if not manifest.exists():
        raise UserError(f"detector {name}: {manifest} is missing; a per-dataset classifier is made by its rule")
    entry = read_json(manifest)
    if entry["kind"] != "classifier":
        raise UserError(f"detector {name}: kind {entry['kind']} of {manifest} is not one this version can run")
    model = Classifier(name, entry["channels"], entry["resolution"], entry["classes"])
    model.load_state_dict(load_shard(verified(manifest.parent, entry["files"][0])))
    return model.eval().requires_grad_(False)


def reference_stats(detector: Detector, real: TensorSet, batch: int = 500) -> FeatureStats:
    """Moments of a whole real set."""
    parts = [FeatureStats.of(detector(part)[0]) for part in real.tensors["images"].split(batch)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


app = typer.Typer(help=__doc__)


@app.command()
def prepare(name: str, out: Path, real: Path | None = None, threads: int = 1) -> None:
    """Train the classifier NAME on the manifest --real; write the manifest OUT and its weights."""
    torch.set_num_threads(threads)
    with readable_errors():
        if real is None:
            raise UserError(f"detector {name}: this version can only train per-dataset classifiers, not load {name}")
        train_classifier(name, load_set(real), out)


@app.command()
def reference(name: str, out: Path, real: Path | None = None, threads: int = 1) -> None:
    """Write the feature moments of the real set --real under detector NAME to OUT."""
    torch.set_num_threads(threads)
    with readable_errors(), torch.no_grad():
        if real is None:
            raise UserError(f"{out.parent.name}: this version computes references from data sets and imports none")
        stats = reference_stats(load_detector(name), load_set(real))
        save_stats(stats, out, {"detector": name, "data": real.parent.name})


if __name__ == "__main__":
    app()
