"""Batches of a source of images in order: files are decoded ahead, samples stay on the device that made them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2.data.sets import Rows
from dmd2.networks.quantise import quantise, quantised
from eval.pixels.images import FileImages, ImageSource, pixel_digest

DECODERS = 16  # threads at most


@dataclass(frozen=True, kw_only=True)
class Sampled(ImageSource):
    """Images drawn from sample seeds ``0 .. count - 1``: no image file between generator and metric.

    `id` is a digest of everything the images depend on (weights, config, label rule, rounding); it addresses the cache.
    `sample` makes images in [-1, 1] ``(n, C, H, W)`` of sample seeds, the same image for a seed in whatever company;
    `rounding` is the rule of `quantise` that makes bytes of them.
    """

    sample: Callable[[list[int]], Tensor]
    rounding: str = "round"

    def read(self, indices: range) -> Tensor:
        """See `ImageSource`."""
        return quantise(self.sample(list(indices)), self.rounding).cpu()


def decoders(source: ImageSource, device: torch.device) -> int:
    """Threads that should decode the images of a source for networks on `device`.

    None for a CPU, which has to do both, and for images that are not encoded; for a GPU one for each core but one.
    """
    if device.type == "cpu" or not isinstance(source, FileImages):
        return 0
    return min(DECODERS, len(os.sched_getaffinity(0)) - 1)


def read(source: ImageSource, pieces: list[range], workers: int = 0) -> Iterator[Rows]:
    """Batches of a source by their index ranges, in this order, each read when its turn comes or ahead by threads.

    Threads suffice, since Pillow decodes without Python's lock. At most two batches a thread wait in memory.

    Yields:
        ``images``, uint8 ``(n, C, H, W)``, with digests of their ``pixels`` ``(n,)``; or, of samples, whether each was
        ``finite`` ``(n,)``, which is to be checked before anything made of them is stored.

    Raises:
        UserError: an image cannot be read.
    """
    if not workers:
        yield from (_rows(source, piece) for piece in pieces)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque[Future[Rows]]()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_rows, source, piece))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def digests(images: Tensor) -> Tensor:
    """Those of `pixel_digest` for uint8 ``(n, C, H, W)`` on the CPU, int64 ``(n,)``."""
    return torch.tensor([pixel_digest(image) for image in images])


def _rows(source: ImageSource, indices: range) -> Rows:
    if isinstance(source, Sampled):
        images, finite = quantised(source.sample(list(indices)), source.rounding)
        return {"images": images, "finite": finite}
    images = source.batch(indices)
    return {"images": images, "pixels": digests(images)}
