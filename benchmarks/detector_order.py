"""Do detectors order spoiled images sanely? Fashion-MNIST test images, untouched and made worse, against train images.

Every column must grow downwards within a group. The first lines are the noise floor: real images never trained on.
``python -m benchmarks.detector_order [DETECTOR ...]`` (Debian package dataset-fashion-mnist)
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.ndimage import gaussian_filter

from dmd2.data.readers import read_idx
from dmd2.data.sets import TensorSet
from eval.detectors.detectors import load_detector, train_classifier
from eval.detectors.networks import FeatureNetwork
from eval.metrics.frechet import FeatureStats, Reference

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSIFIER = "fashion-classifier"
DETECTORS = ["lite0-320@32", "lite0-320@64", "lite0-1280@64", "lite0-112@64", CLASSIFIER]
IMAGES = 4000


def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 28, 28)`` uint8 and labels of ``train`` or ``t10k``."""
    return tuple(read_idx(SOURCE / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))


def spoiled(test: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Groups of ever worse sets."""
    rng = np.random.default_rng(0)

    def noisy(deviation: float) -> np.ndarray:
        return (test + deviation * rng.standard_normal(test.shape)).round().clip(0, 255).astype(np.uint8)

    def blurred(sigma: float) -> np.ndarray:
        return gaussian_filter(test.astype(np.float32), (0, sigma, sigma)).round().clip(0, 255).astype(np.uint8)

    return {
        "blur": {"test": test} | {f"blur {s} px": blurred(s) for s in (0.5, 1, 2)},
        "noise": {"test": test} | {f"noise {s}": noisy(s) for s in (5, 25, 60)},
        "classes": {"test": test, "classes 0-4": test[labels < 5], "class 0": test[labels == 0]},
    }


def distance(detector: FeatureNetwork, reference: Reference, pixels: np.ndarray) -> float:
    """Frechet distance of a set."""
    return reference.distance(FeatureStats.of(features(detector, pixels)))


def features(detector: FeatureNetwork, pixels: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        parts = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2))))[:, None].split(250)
        return torch.cat([detector(part)[0] for part in parts])


def detector_of(name: str, folder: Path, train: np.ndarray, labels: np.ndarray) -> FeatureNetwork:
    """A network whose weights are here, or the classifier, trained now on images that are not in the comparison."""
    if name != CLASSIFIER:
        return load_detector(name)
    pixels = torch.from_numpy(np.pad(train, ((0, 0), (2, 2), (2, 2))))[:, None].contiguous()
    train_classifier(name, TensorSet({"images": pixels, "labels": torch.from_numpy(labels.astype(np.int64))}),
                     folder / name / "manifest.json")  # fmt: skip
    return load_detector(name, folder)


def main(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    torch.set_num_threads(1)
    train, train_labels = images("train")
    test, labels = (array[:IMAGES] for array in images("t10k"))
    order = np.random.default_rng(0).permutation(len(train))
    sets = spoiled(test, labels)
    with TemporaryDirectory() as folder:
        for name in names or DETECTORS:
            detector = detector_of(name, Path(folder), train[order[2 * IMAGES :]], train_labels[order[2 * IMAGES :]])
            reference = Reference(FeatureStats.of(features(detector, train[order[:IMAGES]])))
            print(f"\n{detector.label}\n{'other train images':<20}"
                  f"{distance(detector, reference, train[order[IMAGES : 2 * IMAGES]]):>10.3f}")  # fmt: skip
            for group in sets.values():
                values = {what: distance(detector, reference, pixels) for what, pixels in group.items()}
                for what, value in values.items():
                    print(f"{what:<20}{value:>10.3f}", flush=True)
                print("in order" if list(values.values()) == sorted(values.values()) else "NOT IN ORDER")


if __name__ == "__main__":
    typer.run(main)
