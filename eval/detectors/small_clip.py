"""A small CLIP of one captioned set, trained here: image and caption embeddings whose cosine says whether they belong.

Image tower: a convolutional network on the set's 8-bit images. Text tower: two layers on the mean of the encoded
tokens, so captions need no second encoder. Loss: symmetric cross-entropy with a learned temperature (Radford et al.
2021). Its cosines are a scale of their own, comparable between runs on the same set and with nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.precision import strict_float32
from dmd2.core.rng import Draws, stream
from dmd2.data.sets import TensorSet, load_shard, save_shard
from eval.detectors.networks import FeatureNetwork, fit, provenance, rgb
from eval.pixels.resize import NONE

CPU = torch.device("cpu")
WIDTH = 128  # dimensions of the embeddings
STEPS, BATCH, LR = 300, 128, 2e-3  # a minute on one CPU core for the emoji
HELD_OUT = 10  # every tenth image
SHIFT, SCALE, COLOUR = 0.15, 0.2, 0.15  # augmentation: shares of the side, of the size, of brightness and contrast


class Images(FeatureNetwork):
    """The image tower as a detector: embeddings ``(n, 128)``, not normalised."""

    def __init__(self, name: str, resolution: int) -> None:
        super().__init__(name, provenance(None, "none", resolution, "image embedding", WIDTH, None))
        self.resolution = resolution
        width, size = 24, resolution
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
        while size > 4:
            wider = min(2 * width, 128)
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(4, wider), nn.SiLU()]
            width, size = wider, -(-size // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(width * size * size, WIDTH))

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings of uint8 ``(n, 3, H, W)``.

        Raises:
            UserError: the images are not of the size it was trained on.
        """
        if images.shape[-2:] != (self.resolution, self.resolution):
            wanted, height, width = f"{self.resolution}x{self.resolution}", *images.shape[-2:]
            raise UserError(f"{self.name} was trained on images of {wanted}, these are {height}x{width}")
        return self.body(images.float() / 127.5 - 1), None


class SmallClip(nn.Module):
    """Both towers, and the logarithm of the inverse temperature. Text is embedded on the CPU once it is trained."""

    geometry, reads_states = NONE, True  # what is done to an image before it; it embeds states, not words

    def __init__(self, name: str, resolution: int, text_width: int) -> None:
        super().__init__()
        self.images = Images(name, resolution)
        self.words = nn.Sequential(
            nn.LayerNorm(text_width), nn.Linear(text_width, 256), nn.SiLU(), nn.Dropout(0.2), nn.Linear(256, WIDTH)
        )
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_width = text_width

    @staticmethod
    def load(manifest: Path, device: torch.device | str = "cpu") -> SmallClip:
        """What `train_clip` wrote, verified."""
        entry = read_json(manifest)
        model = SmallClip(entry["name"], entry["resolution"], entry["text_width"])
        model.load_state_dict(load_shard(verified(manifest.parent, entry["files"][0])))
        model.requires_grad_(False).eval()
        model.images.about |= {"weights": entry["files"][0]["sha256"], "verified": True}
        model.images.on(device)
        return model

    @torch.no_grad()
    def texts(self, captions: list[str], states: Tensor | None) -> Tensor:
        """Embeddings ``(n, 128)`` of captions by their encoder states ``(n, L, D)``; the words are not read.

        Raises:
            UserError: the states are of another text encoder than it was trained on.
        """
        assert states is not None
        if states.shape[-1] != self.text_width:
            wanted, had = self.text_width, states.shape[-1]
            raise UserError(f"{self.images.name} was trained on text states of {wanted} dimensions, these have {had}")
        with strict_float32(CPU):
            return self.words(pooled(states.cpu()))

    def logits(self, images: Tensor, states: Tensor) -> Tensor:
        """Scaled cosines ``(n, m)`` of images in [-1, 1] with every caption's states."""
        image, text = (F.normalize(x, dim=1) for x in (self.images.body(images), self.words(pooled(states))))
        return self.scale.exp().clamp(max=100) * image @ text.T


def pooled(states: Tensor) -> Tensor:
    """Mean over tokens ``(n, D)`` of states ``(n, L, D)``; states of padding, where they are zero, do not count."""
    states = states.float()
    real = states.abs().sum(dim=2, keepdim=True) > 0
    return states.sum(dim=1) / real.sum(dim=1).clamp(min=1)


def augmented(images: Tensor, draws: Draws) -> Tensor:
    """Images in [-1, 1] shifted, scaled, of other brightness and contrast; never flipped: arrows have a side."""
    n = len(images)

    def drawn(name: str, *shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=stream(f"{draws.seed}/{draws.iteration}/{name}")) - 1

    shift, scale, colour = drawn("shift", n, 2), drawn("scale", n), drawn("colour", n, 2)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + SCALE * scale
    theta[:, :, 2] = 2 * SHIFT * shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, offset = (1 + COLOUR * colour[:, 0], COLOUR * colour[:, 1])
    return moved * gain[:, None, None, None] + offset[:, None, None, None]


def train_clip(name: str, real: TensorSet, out: Path, device: torch.device = CPU, steps: int = STEPS) -> None:
    """Train the set's CLIP with a fixed seed on nine of ten images; the tenth ones state how well it retrieves.

    Raises:
        UserError: the set has no encoded captions or no 8-bit images.
    """
    pixels, states = _rows(name, real)
    held_out = torch.arange(len(pixels)) % HELD_OUT == 0
    shape = {"resolution": pixels.shape[-1], "text_width": states.shape[-1]}
    with torch.random.fork_rng():  # dropout draws on the device
        torch.manual_seed(stream(f"0/{name}").initial_seed())
        model = SmallClip(name, **shape).to(device)
        model.images.device = device
        _fit(name, model, pixels[~held_out], states[~held_out], steps, device)
    model.requires_grad_(False).eval()
    path = out.parent / "clip.safetensors"
    save_shard(path, {key: value.cpu() for key, value in model.state_dict().items()})
    about: dict[str, Any] = {"kind": "clip", "name": name, **shape, "trained_on": int((~held_out).sum())}
    for part, rows in (("held_out", held_out), ("trained", ~held_out)):
        about[part] = retrieval(model, pixels[rows], states[rows])
    write_json(out, {**about, "files": listing([path], out.parent)})


def _rows(name: str, real: TensorSet) -> tuple[Tensor, Tensor]:
    tensors = real.tensors
    pixels = tensors.get("pixels", tensors["images"])
    if "text" not in tensors or pixels.dtype != torch.uint8:
        lacking = "no encoded captions" if "text" not in tensors else "latents only: set data.text.keep_images"
        raise UserError(f"{name}: its set has {lacking}")
    return rgb(pixels), tensors["text"]


def _fit(name: str, model: SmallClip, pixels: Tensor, states: Tensor, steps: int, device: torch.device) -> None:
    """Dropout draws from torch's global generator, which the caller has seeded."""
    model.train()
    batch = min(BATCH, len(pixels))

    def loss(it: int) -> Tensor:
        draws = Draws(0, it, batch, 0, batch)
        rows = draws.shuffled(f"{name}/real", len(pixels))
        images = augmented(pixels[rows].float() / 127.5 - 1, draws)
        logits = model.logits(images.to(device), states[rows].to(device))
        target = torch.arange(batch, device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    fit([{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], LR, steps, loss)


@torch.no_grad()
def retrieval(model: SmallClip, pixels: Tensor, states: Tensor) -> dict[str, Any]:
    """Shares of images and captions that retrieve each other among all rows, and mean cosines."""
    images = torch.cat([model.images(part)[0].cpu() for part in pixels.split(256)])
    texts = torch.cat([model.words(pooled(part.to(model.images.device))).cpu() for part in states.split(256)])
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    n, own = len(cosines), cosines.diagonal()
    rank = (cosines > own[:, None]).sum(dim=1)
    shares = {
        "caption_first": (rank == 0).float().mean(),
        "caption_in_first_5": (rank < 5).float().mean(),
        "image_first": (cosines.argmax(dim=0) == torch.arange(n)).float().mean(),
        "cosine": own.mean(),
        "cosine_of_others": (cosines.sum() - own.sum()) / max(n * (n - 1), 1),
    }
    return {"pairs": n, **{name: round(float(value), 4) for name, value in shares.items()}}
