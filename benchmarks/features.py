"""From a folder of PNGs to Inception features: images per second and peak memory of our engine and of clean-fid.

Same files, same network (TorchScript with random weights and the real call interface), same threads and batch, no
workers. Every measurement is a process of its own, the two tools take turns, medians are reported, by wall clock and,
for a busy machine, by CPU time; the features are compared too. Two to three minutes on two idle cores:
``python -m benchmarks.features [IMAGES]``
"""

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIZES, ROUNDS, BATCH, THREADS = (64, 512), 3, 16, 2
SCRIPT = "inception-2015-12-05"


class Inception(nn.Module):
    """The call interface of inception-2015-12-05.pt around a network that is already traced."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = self.layers(img)
        return features if return_features else self.output(features)


def write_network(folder: Path) -> None:
    from eval.detectors.networks import inception_2015

    torch.manual_seed(0)
    net = inception_2015()
    net.fc = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # else the signal dies out over 94 layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = torch.jit.trace(net.eval(), torch.rand(2, 3, 299, 299))
        (folder / SCRIPT).mkdir(parents=True)
        torch.jit.script(Inception(layers).eval()).save(str(folder / SCRIPT / f"{SCRIPT}.pt"))


def write_images(folder: Path, count: int, size: int, seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        pixels = np.asarray(coarse) + rng.normal(0, 10, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")


def ours(weights: Path, folder: Path, cache: Path):
    from eval.detectors.networks import TorchScriptInception
    from eval.detectors.reference import Engine
    from eval.detectors.weights import Weights
    from eval.pixels.images import open_images
    from eval.pixels.resize import NONE

    network = Weights(weights / SCRIPT / f"{SCRIPT}.pt", "0" * 64, verified=False)
    engine = Engine(TorchScriptInception(SCRIPT, network, "clean").on("cpu"), NONE, cache, BATCH)
    engine.features(open_images(folder / "warm"))
    for size in SIZES:
        yield size, lambda path: engine.features(open_images(path)).features


def theirs(weights: Path, folder: Path, cache: Path):
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W(str(weights / SCRIPT), download=False, resize_inside=False).eval()
    options = {"num_workers": 0, "batch_size": BATCH, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    fid.get_folder_features(str(folder / "warm"), network, **options)
    for size in SIZES:
        yield size, lambda path: fid.get_folder_features(str(path), network, **options)


TOOLS = {"ours": ours, "clean-fid": theirs}


def measure(tool: str, folder: Path) -> None:
    """One process of one tool: seconds per size and peak memory, as JSON on stdout; features beside it."""
    torch.set_num_threads(THREADS)
    with TemporaryDirectory() as cache:
        seconds = {}
        for size, extract in TOOLS[tool](folder / "weights", folder, Path(cache)):
            started, used = time.perf_counter(), time.process_time()
            features = extract(folder / str(size))
            seconds[size] = time.perf_counter() - started, time.process_time() - used
            np.save(folder / f"{tool}-{size}.npy", features)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def main(count: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_network(folder / "weights")
        write_images(folder / "warm", 2 * BATCH, 64, 0)  # TorchScript optimises itself during the first batches
        for size in SIZES:
            write_images(folder / str(size), count, size, 1)
        found: dict[str, list[dict]] = {tool: [] for tool in TOOLS}
        for number in range(ROUNDS):
            for tool in list(TOOLS)[:: 1 if number % 2 else -1]:
                line = [sys.executable, "-W", "ignore", "-m", "benchmarks.features", tool, name]
                found[tool].append(json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout))
        print(f"{count} images, batch {BATCH}, {THREADS} threads, median of {ROUNDS}")
        print(f"{'pixels':>6}{'clock':>6}{'ours, images/s':>16}{'clean-fid':>11}{'ratio':>7}")
        for size in SIZES:
            for clock, name in enumerate(("wall", "CPU")):
                runs = [[result["seconds"][str(size)][clock] for result in found[tool]] for tool in TOOLS]
                rates = [count / statistics.median(seconds) for seconds in runs]
                print(f"{size:>6}{name:>6}{rates[0]:>16.2f}{rates[1]:>11.2f}{rates[0] / rates[1]:>7.2f}")
            a, b = (np.load(folder / f"{tool}-{size}.npy") for tool in TOOLS)
            difference = np.abs(a - b).max() / b.std(axis=0).mean()
            print(f"{size:>6} largest difference of features, in their SD: {difference:.1e}")
        peaks = [statistics.median(r["peak"] for r in found[tool]) for tool in TOOLS]
        print(f"peak memory: ours {peaks[0]:.0f} MiB, clean-fid {peaks[1]:.0f} MiB, ratio {peaks[0] / peaks[1]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TOOLS:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 48)
