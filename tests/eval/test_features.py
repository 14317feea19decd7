"""Features in shards: the same for any batch, process and worker, resumed after a kill, damage named."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.core.rng import sample_noise
from eval.detectors import features
from eval.detectors.features import (
    FeatureSet,
    Observer,
    cache_folder,
    extract,
    join,
    shards_of,
    stream_moments,
)
from eval.detectors.networks import FeatureNetwork
from eval.detectors.reading import Sampled, decoders
from eval.metrics.frechet import FeatureStats
from eval.pixels.images import ImageSource, open_images, pixel_digest

COUNT = 730


class Quadrants:
    """Detector of tests: means of the quadrants of each channel; an image's features never depend on its company."""

    name, label, is_fid, device = "quadrants", "FD (quadrants)", False, torch.device("cpu")

    def __init__(self, weights: str = "0" * 64) -> None:
        self.about = {"weights": weights, "resize": "none"}
        self.seen: list[int] = []

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(len(images))
        means = torch.nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1).double(), 2).flatten(1)
        return means.float(), means[:, :10].float()

    look = FeatureNetwork.look


def draw(seeds: list[int]) -> torch.Tensor:
    """uint8 images (n, 3, 8, 8) that belong to their seeds."""
    return (sample_noise(seeds, (3, 8, 8), "test") * 40 + 128).clamp(0, 255).to(torch.uint8)


def features_of(*batches: torch.Tensor, detector: Observer | None = None) -> FeatureSet:
    """Features of images that no cache holds."""
    found = detector or Quadrants()
    values, logits = (torch.cat(parts).numpy() for parts in zip(*map(found, batches), strict=True))
    pixels = np.array([pixel_digest(image) for batch in batches for image in batch])
    about = {"id": "test", "images": len(pixels), "geometry": "none", "small": 0}
    return FeatureSet({"features": values, "logits": logits, "pixels": pixels}, about, features.account(found))


def drawn(seeds: list[int]) -> torch.Tensor:
    """The same images in [-1, 1]."""
    return draw(seeds).float() / 127.5 - 1


IMAGES = Sampled("images", COUNT, sample=drawn)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(features, "ROWS", 100)


def whole(cache: Path, **options) -> FeatureSet:
    return join(extract(IMAGES, Quadrants(), cache, **options), COUNT)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_moments_depend_neither_on_the_batch_nor_on_the_number_of_shards(tmp_path, batch, processes) -> None:
    for process in reversed(range(processes)):  # any order
        folder = extract(IMAGES, Quadrants(), tmp_path, shards_of(COUNT, process, processes), batch)
    expected = FeatureStats.of(Quadrants()(draw(list(range(COUNT))))[0])
    for stats in (stream_moments(folder, COUNT), FeatureStats.of(join(folder, COUNT).features)):
        assert stats.count == COUNT
        np.testing.assert_allclose(stats.mean, expected.mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(stats.covariance, expected.covariance, rtol=0, atol=1e-10)


def test_two_processes_that_fill_the_same_shard_leave_a_whole_one(tmp_path, monkeypatch) -> None:
    """Their features may differ in rounding, on two kinds of GPU: the note must be that of the file beside it."""

    class Rounded(Quadrants):
        def __call__(self, images):
            return tuple(x + 1e-6 * (x.abs() + 1) for x in super().__call__(images))

    source, original = Sampled("images", 50, sample=drawn), features.listing
    other = threading.Thread(target=lambda: extract(source, Rounded(), tmp_path))

    def listing(paths, folder):
        found = original(paths, folder)
        if threading.current_thread() is not other and not other.ident:
            other.start()
            other.join(timeout=1)  # between the checksum and the note of this one
        return found

    monkeypatch.setattr(features, "listing", listing)
    folder = extract(source, Quadrants(), tmp_path)
    other.join()
    assert len(join(folder, 50)) == 50


def test_moments_in_pieces_keep_their_digits_at_a_large_offset(tmp_path) -> None:
    class Offset(Quadrants):
        def __call__(self, images):
            return (super().__call__(images)[0].double() / 255 * 0.05 + 30).float(), None

    folder = extract(IMAGES, Offset(), tmp_path)
    x = join(folder, COUNT).features.astype(np.float64)
    np.testing.assert_allclose(stream_moments(folder, COUNT).covariance, np.cov(x.T), rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 99, 100, 101, 730, 50_000])
def test_shards_of_all_processes_are_all_indices_once(count, processes) -> None:
    rows = [index for process in range(processes) for block in shards_of(count, process, processes) for index in block]
    assert sorted(rows) == list(range(count))


def killed_in_shard_three(cache: Path) -> None:
    class Deadly(Quadrants):
        def __call__(self, images):
            if sum(self.seen) >= 250:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(images)

    extract(IMAGES, Deadly(), cache, batch=50)


def test_kill_costs_only_the_shard_in_work(tmp_path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_in_shard_three, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    detector = Quadrants()
    folder = cache_folder(IMAGES, detector, tmp_path)
    with pytest.raises(UserError, match="features of images 200 to 729 are missing"):
        join(folder, COUNT)
    resumed = join(extract(IMAGES, detector, tmp_path, batch=50), COUNT)
    assert sum(detector.seen) == COUNT - 200
    np.testing.assert_array_equal(resumed.features, whole(tmp_path / "other", batch=50).features)


def test_missing_shard_is_named_and_only_it_is_made_again(tmp_path) -> None:
    folder = extract(IMAGES, Quadrants(), tmp_path)
    (folder / "features-000200-000300.safetensors").unlink()
    (folder / "features-000200-000300.json").unlink()
    with pytest.raises(UserError, match="features of images 200 to 299 are missing"):
        join(folder, COUNT)
    detector = Quadrants()
    extract(IMAGES, detector, tmp_path)
    assert sum(detector.seen) == 100
    assert len(join(folder, COUNT)) == COUNT


def test_truncated_and_changed_shards_are_named(tmp_path) -> None:
    folder = extract(IMAGES, Quadrants(), tmp_path)
    path = folder / "features-000100-000200.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"features-000100-000200\.safetensors has .* truncated"):
        join(folder, COUNT)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"features-000100-000200\.safetensors does not match the checksum"):
        stream_moments(folder, COUNT)
    path.unlink()
    extract(IMAGES, Quadrants(), tmp_path)
    assert len(join(folder, COUNT)) == COUNT


def test_cache_is_reused_for_the_same_content_and_detector_only(tmp_path) -> None:
    first = extract(IMAGES, Quadrants(), tmp_path)
    again = Quadrants()
    assert extract(IMAGES, again, tmp_path, batch=13) == first and not again.seen
    for source, detector in (
        (Sampled("other images", COUNT, sample=drawn), Quadrants()),
        (Sampled("images", COUNT - 1, sample=drawn), Quadrants()),
        (IMAGES, Quadrants("1" * 64)),
    ):
        assert extract(source, detector, tmp_path, [range(0, 30)]) != first
        assert detector.seen == [30]


def test_rows_that_repeat_or_exceed_are_refused(tmp_path) -> None:
    folder = extract(IMAGES, Quadrants(), tmp_path)
    with pytest.raises(UserError, match="holds features of 730 images instead of 700"):
        join(folder, 700)
    extract(IMAGES, Quadrants(), tmp_path, [range(150, 250)])
    with pytest.raises(UserError, match=r"features-000150-000250\.json repeats rows 150 to 199"):
        join(folder, COUNT)


def test_shard_shorter_than_its_name_is_refused(tmp_path) -> None:
    folder = extract(IMAGES, Quadrants(), tmp_path, [range(0, 100)])
    for suffix in ("json", "safetensors"):
        (folder / f"features-000000-000100.{suffix}").rename(folder / f"features-000000-000101.{suffix}")
    note = folder / "features-000000-000101.json"
    note.write_text(note.read_text().replace("000100.safetensors", "000101.safetensors"))
    with pytest.raises(UserError, match="named for 101 rows but holds 100"):
        join(folder, 101)


def test_generator_that_returns_too_few_images_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="samples 0 to 49 gave 49 images"):
        extract(Sampled("short", 50, sample=lambda seeds: drawn(seeds[1:])), Quadrants(), tmp_path)


def test_features_that_are_not_finite_name_their_image(tmp_path) -> None:
    class Broken(Quadrants):
        def __call__(self, images):
            values, logits = super().__call__(images)
            values[3, 2] = torch.nan
            return values, logits

    with pytest.raises(UserError, match="NaN or infinite features for image 53"):
        extract(IMAGES, Broken(), tmp_path, [range(50, 60)])


def test_duplicates_are_found_across_shards_and_grey_equals_its_replica(tmp_path) -> None:
    assert whole(tmp_path).duplicates == 0
    folder = extract(Sampled("twice", 300, sample=lambda seeds: drawn([s % 150 for s in seeds])), Quadrants(), tmp_path)
    assert join(folder, 300).duplicates == 150
    grey = draw([1])[:, :1]
    assert features_of(grey, grey.expand(-1, 3, -1, -1), draw([2])).duplicates == 1


class Unreadable(ImageSource):
    """A source whose tenth image cannot be read."""

    def read(self, indices: range) -> torch.Tensor:
        if 10 in indices:
            raise UserError("image 10 is truncated")
        return draw(list(indices))


def test_error_in_a_worker_arrives_as_its_sentence(tmp_path) -> None:
    with pytest.raises(UserError) as error:
        extract(Unreadable("unreadable", 20), Quadrants(), tmp_path, batch=5, workers=2)
    assert str(error.value) == "image 10 is truncated"


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_gives_equal_features_and_few_batches_wait(tmp_path, workers) -> None:
    class Counted(ImageSource):
        def read(self, indices: range) -> torch.Tensor:
            begun.append(indices[0])
            return draw(list(indices))

    class Slow(Quadrants):
        def look(self, images):
            ahead.append(len(begun) - len(ahead))
            return super().look(images)

    begun, ahead = list[int](), list[int]()
    folder = extract(Counted("counted", 130), Slow(), tmp_path, workers=workers, batch=5)
    assert np.array_equal(join(folder, 130).features, Quadrants()(draw(list(range(130))))[0])
    assert sorted(begun) == list(range(0, 130, 5)) and max(ahead) <= 2 * workers + 1


def test_only_files_for_a_gpu_are_decoded_ahead(tmp_path, monkeypatch) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "0.png")
    np.save(tmp_path / "a.npy", np.zeros((3, 3, 4, 4), np.uint8))
    files, array = open_images(tmp_path), open_images(tmp_path / "a.npy")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert [decoders(*case) for case in ((files, gpu), (files, cpu), (array, gpu), (IMAGES, gpu))] == [7, 0, 0, 0]


class Remote(Quadrants):
    """Says that it is on a GPU, so that a thread stores what it gave; tensors are the CPU's."""

    device = torch.device("cuda")


@pytest.mark.parametrize("held", [features.HELD, 1])
def test_features_that_a_thread_stores_are_the_same(tmp_path, monkeypatch, held) -> None:
    monkeypatch.setattr(features, "HELD", held)
    stores: list[int] = []
    store = features._Outputs.store
    monkeypatch.setattr(features._Outputs, "store", lambda self, held: (stores.append(len(held)), store(self, held)))
    detector = Remote()
    ours, theirs = (join(extract(IMAGES, one, tmp_path, batch=30), COUNT).found for one in (detector, Quadrants()))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    if held > 1:  # seven shards of 100 in batches of 30, 30, 30 and 10, and one of 30
        assert stores == [4] * 7 + [1]


@pytest.mark.parametrize("detector", [Quadrants(), Remote()], ids=["cpu", "gpu"])
def test_images_that_are_not_finite_are_named_before_their_shard_is_stored(tmp_path, detector) -> None:
    def sample(seeds: list[int]) -> torch.Tensor:
        images = drawn(seeds)
        if 253 in seeds:
            images[seeds.index(253), 0, 1, 2] = torch.inf
        return images

    source = Sampled("diverged", COUNT, sample=sample)
    with pytest.raises(UserError, match="image 253 has NaN or infinite pixels: the generator diverged"):
        extract(source, detector, tmp_path, batch=40)
    found = sorted(path.name for path in cache_folder(source, detector, tmp_path).glob("*.json"))
    assert found == ["about.json", "features-000000-000100.json", "features-000100-000200.json"]


def test_folder_says_what_it_holds(tmp_path) -> None:
    folder = extract(IMAGES, Quadrants(), tmp_path, [range(0, 10)])
    about = read_json(folder / "about.json")
    assert about["source"] == {"id": "images", "images": COUNT, "geometry": "none", "small": 0}
    assert about["detector"]["weights"] == "0" * 64
    note = read_json(folder / "features-000000-000010.json")
    assert (note["batch"], note["device"]) == (64, "cpu")
    note = read_json(extract(IMAGES, Remote(), tmp_path / "gpu", [range(0, 10)]) / "features-000000-000010.json")
    assert (note["batch"], note["device"]) == (128, "cuda")
