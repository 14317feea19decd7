"""From images to features: images per second of our engine and of clean-fid, of the network alone, of the sampler.

**folder**: PNG files -> Inception features, ours and clean-fid's. The same files, network (TorchScript with random
weights and the real call interface), threads and batch, with decoders beside the main process and without. Every
measurement is a process of its own, the tools take turns, medians are reported, by wall clock and, for a busy machine,
by CPU time; the features are compared, too. **network**: the detector's layers on tensors that lie on the device.
**sampler**: a student of full size with random weights, alone, and on to the features as an evaluation does it, which
ends in files. Two to three minutes on two idle cores, where `--tiny` is for:

    python -m benchmarks.evaluation --images 48 --tiny
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn

from benchmarks.device import name_of_device, seconds
from benchmarks.tables import listed, markdown
from dmd2.core.precision import strict_float32

SCRIPT = "inception-2015-12-05"
PARTS = "folder,network,sampler"
REPEATS = 20  # of the network alone


class Inception(nn.Module):
    """The call interface of inception-2015-12-05.pt around a network that is already traced."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        if img.shape[-1] != 299:
            img = F.interpolate(img, size=(299, 299), mode="bilinear")
        features = self.layers((img - 128) / 128)
        return features if return_features else self.output(features)


def write_network(folder: Path) -> None:
    from eval.detectors.networks import inception_2015

    torch.manual_seed(0)
    net = inception_2015()
    net.fc = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # else the signal dies out over 94 layers
    # A trace keeps the permission to convolve in TF32, which a new process has.
    with warnings.catch_warnings(), strict_float32(torch.device("cpu")):
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


class Way(NamedTuple):
    """How a tool is called."""

    tool: str
    workers: int
    batch: int
    threads: int
    device: str
    sizes: tuple[int, ...]


def detector(weights: Path, resize: str, device: str) -> Any:
    from eval.detectors.networks import TorchScriptInception
    from eval.detectors.weights import Weights

    network = Weights(weights / SCRIPT / f"{SCRIPT}.pt", "0" * 64, verified=False)
    return TorchScriptInception(SCRIPT, network, resize).on(device)


def ours(way: Way, folder: Path, cache: Path) -> Callable[[Path], Any]:
    from eval.detectors.reference import Engine
    from eval.pixels.images import open_images
    from eval.pixels.resize import NONE

    engine = Engine(detector(folder / "weights", "clean", way.device), NONE, cache, way.batch, way.workers)
    return lambda path: engine.features(open_images(path)).features


def theirs(way: Way, folder: Path, cache: Path) -> Callable[[Path], Any]:
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W(str(folder / "weights" / SCRIPT), download=False, resize_inside=False).eval()
    options = {"num_workers": way.workers, "batch_size": way.batch, "device": torch.device(way.device),
               "mode": "clean", "verbose": False}  # fmt: skip
    network = network.to(way.device)
    return lambda path: fid.get_folder_features(str(path), network, **options)


TOOLS = {"ours": ours, "clean-fid": theirs}


def measure(way: Way, folder: Path) -> None:
    """One process of one tool: seconds per size, also of CPUs, and peak memory as JSON; features beside the images."""
    torch.set_num_threads(way.threads)
    with TemporaryDirectory() as cache:
        extract, found = TOOLS[way.tool](way, folder, Path(cache)), {}
        extract(folder / "warm")
        for size in way.sizes:
            started, used = time.perf_counter(), sum(os.times()[:4])
            features = extract(folder / str(size))
            found[size] = time.perf_counter() - started, sum(os.times()[:4]) - used
            np.save(folder / f"{way.tool}-{size}.npy", features)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": found, "peak": peak}))


def folders(ways: list[Way], count: int, rounds: int, folder: Path) -> str:
    """Table of both tools on folders of images."""
    write_images(folder / "warm", 2 * ways[0].batch, 64, 0)  # TorchScript optimises itself during the first batches
    for size in ways[0].sizes:
        write_images(folder / str(size), count, size, 1)
    found: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[:: 1 if number % 2 else -1]:
            line = [sys.executable, "-W", "ignore", "-m", "benchmarks.evaluation", "--child"]
            done = subprocess.run(
                [*line, json.dumps([way, str(folder)])], check=True, stdout=subprocess.PIPE, text=True
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for size in ways[0].sizes:
        rates = {way: [count / statistics.median(run["seconds"][str(size)][clock] for run in runs) for clock in (0, 1)]
                 for way, runs in found.items()}  # fmt: skip
        best = [max(rate[clock] for way, rate in rates.items() if way.tool == "clean-fid") for clock in (0, 1)]
        for way, (wall, cpu) in rates.items():
            peak = statistics.median(run["peak"] for run in found[way])
            rows.append([str(size), way.tool, str(way.workers), f"{wall:.1f}", f"{wall / best[0]:.2f}", f"{cpu:.1f}",
                         f"{cpu / best[1]:.2f}", f"{peak:.0f}"])  # fmt: skip
        a, b = (np.load(folder / f"{tool}-{size}.npy") for tool in TOOLS)
        difference = np.abs(a - b).max() / b.std(axis=0).mean()
        rows.append([str(size), f"features differ by {difference:.1e} of their SD", *[""] * 6])
    return markdown(["pixels", "tool", "workers", "images/s", "/ clean-fid's best", "images / s of CPU time",
                     "/ clean-fid's best", "peak of the process, MiB"], rows)  # fmt: skip


def network_alone(weights: Path, batch: int, device: str, repeats: int) -> str:
    """Rates of the detector, of its layers without resize and with everything around it."""
    from dmd2.core.precision import strict_float32

    made, rows = detector(weights, "tf1", device), []
    for name, side, call in (("layers alone", 299, made.extract), ("detector, with resize", 64, made.look)):
        images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        with torch.no_grad(), strict_float32(torch.device(device)):
            for _ in range(3):
                call(images)
            rate = repeats * batch / seconds(lambda call=call, images=images: [call(images) for _ in range(repeats)])
        rows.append([name, str(side), f"{rate:.1f}"])
    return markdown(["network on tensors that lie on the device", "pixels", "images/s"], rows)


def sampled(weights: Path, precisions: list[str], count: int, batch: int, device: str, rounds: int, tiny: bool) -> str:
    """Rates of a student's sampler alone, and of sampler and features as an evaluation runs them."""
    from benchmarks.random_runs import tiny_config
    from dmd2.experiment.tables import load_base
    from dmd2.networks.denoisers import SAMPLING
    from dmd2.planning.memory import architecture
    from dmd2.training.sampling import student_sample
    from dmd2.training.teachers import build_network, wrap
    from eval.runs.evaluate import Generator
    from eval.runs.protocol import Protocol

    base, network = load_base("imagenet64"), detector(weights, "tf1", device)
    base, place = tiny_config(base) if tiny else base, torch.device(device)
    cases = {}
    for precision in precisions:
        update = {"images": count, "draws": 1, "batch": batch, "shards": 1, "precision": precision}
        cfg = base.model_copy(update={"eval": base.eval.model_copy(update=update)})
        plain = build_network(architecture(cfg), 0)
        student = wrap(plain, cfg.teacher.parameterisation, SAMPLING[precision]).eval().requires_grad_(False).to(place)

        def sample(seeds: list[int], cond: Any, student: Any = student, cfg: Any = cfg) -> Tensor:
            return student_sample(student, cfg, seeds, place, cfg.eval.labels, cond)

        generator = Generator(cfg, place, student, sample, lambda: iter([]))
        cases[precision] = generator, Protocol(cfg, network, None, {})
    times: dict[str, list[tuple[float, float]]] = {precision: [] for precision in precisions}
    for number in range(rounds + 1):
        for precision, (generator, protocol) in cases.items():
            parts = [list(range(start, min(start + batch, count))) for start in range(0, count, batch)]
            alone = seconds(lambda generator=generator, parts=parts: [generator(part) for part in parts])
            with TemporaryDirectory() as scratch:
                identity = {"weights": f"{precision} {number}"}
                both = seconds(lambda p=protocol, g=generator, i=identity, s=scratch: p.fill(g, i, Path(s), 0))
            if number:  # the first round warms up
                times[precision].append((alone, both))
    rows = []
    for precision, found in times.items():
        alone, both = (count / statistics.median(pair[i] for pair in found) for i in (0, 1))
        rows.append([precision, f"{alone:.1f}", f"{both:.1f}", f"{both / alone:.2f}"])
    return markdown(["precision", "sampler alone, images/s", "sampler -> features, images/s", "ratio"], rows)


def main(
    images: Annotated[int, typer.Option(help="in each folder, and sampled; 0: 48, on a GPU 4096")] = 0,
    sizes: Annotated[str, typer.Option(help="pixels of the images in folders")] = "64,512",
    workers: Annotated[str, typer.Option(help="beside the main process; by default 0 and the other cores")] = "",
    precision: Annotated[str, typer.Option(help="of the sampler")] = "fp32,tf32,bf16",
    parts: str = PARTS,
    batch: Annotated[int, typer.Option(help="0: 16, on a GPU 128")] = 0,
    rounds: int = 3,
    threads: int = 2,
    tiny: Annotated[bool, typer.Option("--tiny", help="a small student")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if child:
        way, name = json.loads(child)
        return measure(Way(*way), Path(name))
    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device, count, batch = (
        "cuda" if on_gpu else "cpu",
        images or (4096 if on_gpu else 48),
        batch or (128 if on_gpu else 16),
    )
    beside = [int(value) for value in listed(workers)] or [0, max(len(os.sched_getaffinity(0)) - 1, 1)]
    wanted, pixels = listed(parts), tuple(int(size) for size in listed(sizes))
    print(f"{count} images, batch {batch}, {threads} threads, {name_of_device()}, torch {torch.__version__}, median of "
          f"{rounds}, the tools in turns; Inception of random weights, float32\n")  # fmt: skip
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_network(folder / "weights")
        if "folder" in wanted:
            ways = [Way(tool, n, batch, threads, device, pixels) for tool in TOOLS for n in beside]
            print(folders(ways, count, rounds, folder) + "\n", flush=True)
        if "network" in wanted:
            print(network_alone(folder / "weights", batch, device, REPEATS if on_gpu else 2) + "\n", flush=True)
        if "sampler" in wanted:
            kinds = listed(precision)
            print(sampled(folder / "weights", kinds, count, batch, device, rounds, tiny) + "\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
