"""Readers of images with captions by kind of source: blocks of images uint8 ``(n, 3, P, P)``, or of latents.

A reader holds one block in memory, not the set, and gives the same rows in the same order every time.
"""

from collections.abc import Iterator

import numpy as np

from dmd2.core.errors import UserError
from dmd2.data.hub_sets import captioned_hub
from dmd2.data.image_files import captioned_folder
from dmd2.data.lmdb_sets import captioned_lmdb
from dmd2.data.tar_sets import webdataset
from dmd2.experiment.data_config import Data


def read_captioned(data: Data, pixels: int, part: int, parts: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Blocks of share `part` (from 0) of `parts` of the source that `data` names, and the captions of their rows.

    Args:
        pixels: sides of the images. Those of an LMDB are latents, float16 ``(n, C, R, R)`` by data.channels and
            data.resolution, as they are.

    Raises:
        UserError: the source is missing or damaged, cannot be shared so, or is of a kind without captions.
    """
    match data.source.kind:
        case "webdataset":
            return webdataset(data, pixels, part, parts)
        case "image-folder":
            return captioned_folder(data, pixels, part, parts)
        case "hub":
            return captioned_hub(data, pixels, part, parts)
        case "lmdb":
            return captioned_lmdb(data, part, parts)
        case "emoji":
            from dmd2.data.emoji import emoji

            return emoji(data, pixels, part, parts)
    raise UserError(
        f"data {data.name}: source {data.source.kind} has no captions: use webdataset, image-folder, hub or lmdb, or "
        f"put safetensors shards and captions-00000.jsonl with their manifest.json under data/real/{data.name}"
    )
