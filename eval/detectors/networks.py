"""Feature networks of the field: Inception in its two published forms, EfficientNet-lite0 taps, DINOv2.

Every network takes uint8 images ``(n, C, H, W)``, does its own resize and normalisation, and returns float32 features
``(n, d)`` on its device. Only features of verified canonical Inception weights may be called FID.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from torch import Tensor, nn
from torchvision.models import inception_v3

from dmd2.core.errors import UserError
from dmd2.core.precision import strict_float32
from dmd2.core.upload import upload
from eval.detectors.weights import Weights, fid_checksums, load_state
from eval.pixels import resize
from eval.pixels.channels import normalised

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation


class FeatureNetwork(nn.Module):
    """A detector with a name and, in `about`, everything its features depend on besides the images.

    It runs in IEEE float32 whatever the process allows. On a CPU it runs on exactly `BATCH` images, which `about`
    records, since kernels change with the batch size and move features by some 1e-5 of their spread; give it multiples
    of that. A GPU, whose kernels are others anyway, takes up to `ON_GPU` images, filled up to a multiple of `BATCH`.
    """

    BATCH, ON_GPU = 16, 128

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.about: dict[str, Any] = {**about, "precision": "float32", "batch": self.BATCH}
        self.device = torch.device("cpu")

    @property
    def is_fid(self) -> bool:
        """Whether distances of these features are FID: decided by the verified checksum, never by a name."""
        return self.about["verified"] and self.about["weights"] in fid_checksums()

    @property
    def label(self) -> str:
        """How a Frechet distance of these features must be called."""
        return "FID" if self.is_fid else f"FD ({self.name})"

    def on(self, device: torch.device | str) -> FeatureNetwork:
        """Move to `device`, frozen and in evaluation mode."""
        self.device = torch.device(device)
        self.to(self.device).eval().requires_grad_(False)
        return self

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` by name, see `eval.detectors.features.Observer`."""
        features, logits = self(images)
        return {"features": features} if logits is None else {"features": features, "logits": logits}

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(n, d)`` and, where the network has a classifier, logits ``(n, classes)``.

        Raises:
            UserError: the images are not uint8 ``(n, 1 or 3, H, W)``.
        """
        images = rgb(upload(images, self.device))
        parts = [self._padded(part) for part in images.split(self.BATCH if images.is_cpu else self.ON_GPU)]
        features, logits = torch.cat([part[0] for part in parts]), [part[1] for part in parts if part[1] is not None]
        return features, torch.cat(logits) if logits else None

    def _padded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        n = len(images)
        filled = torch.cat([images, images[:1].expand(-n % self.BATCH, -1, -1, -1)])
        with strict_float32(self.device):
            features, logits = self.extract(filled)
        return features[:n].float(), None if logits is None else logits[:n].float()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same from uint8 ``(n, 3, H, W)`` on the network's device."""
        raise NotImplementedError


def fit(parameters: Iterable[Any], lr: float, steps: int, loss: Callable[[int], Tensor], decay: float = 0.0) -> None:
    """Train by AdamW under a one-cycle schedule; `loss` is that of a step by its number."""
    optimiser = torch.optim.AdamW(parameters, lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for it in range(steps):
        value = loss(it)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()


def provenance(
    weights: Weights | None, resize_name: str, side: int, layer: str, features: int, classes: str | None
) -> dict[str, Any]:
    """Everything that features depend on; `weights` is None before the weights of a network trained here are loaded."""
    found: dict[str, Any] = {"weights": None, "verified": False}
    if weights is not None:
        found = {"weights": weights.sha256, "file": weights.path.name, "verified": weights.verified}
    return {**found, "resize": resize_name, "input": side, "layer": layer, "features": features, "classes": classes}


def rgb(images: Tensor) -> Tensor:
    """uint8 images with three channels; grey ones are replicated.

    Raises:
        UserError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        kind = str(images.dtype).removeprefix("torch.")
        raise UserError(f"a detector takes uint8 images (n, 1 or 3, H, W), got {kind} of shape {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


class TorchScriptInception(FeatureNetwork):
    """The 2015 Inception as NVIDIA's TorchScript file: 2048 pooled features.

    `tf1` resizes inside the network (EDM, StyleGAN, clean-fid's ``legacy_tensorflow``); `clean` feeds the layers
    directly (clean-fid). Logits leave out the bias, as the Inception score is defined (Salimans et al. 2016).
    """

    def __init__(self, name: str, weights: Weights, resize_name: str) -> None:
        super().__init__(name, provenance(weights, resize_name, 299, "pool3", 2048, "Inception-2015 (1008)"))
        with warnings.catch_warnings():
            # torch.jit is deprecated, but the canonical network exists in no other form.
            warnings.simplefilter("ignore", FutureWarning)
            self.base = torch.jit.load(weights.path, map_location="cpu")
        self.resize_name = resize_name

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits."""
        if self.resize_name == "tf1":
            features = self.base(images.float(), return_features=True)
        else:
            features = self.base.layers((resize.clean(images, 299) - 128) / 128)
        features = features.reshape(len(images), 2048)
        return features, F.linear(features, self.base.output.weight)


def inception_2015() -> nn.Module:
    """torchvision's Inception with the pooling of the 2015 graph: unpadded means, and a maximum in the last block."""
    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = (FIDInceptionA(*wide) for wide in ((192, 32), (256, 64), (288, 64)))
    net.Mixed_6b, net.Mixed_6c = FIDInceptionC(768, 128), FIDInceptionC(768, 160)
    net.Mixed_6d, net.Mixed_6e = FIDInceptionC(768, 160), FIDInceptionC(768, 192)
    net.Mixed_7b, net.Mixed_7c = FIDInceptionE_1(1280), FIDInceptionE_2(2048)
    return net


class PortedInception(FeatureNetwork):
    """The 2015 Inception as pytorch-fid's state dict, with pytorch-fid's resize; logits leave out the bias."""

    def __init__(self, name: str, weights: Weights) -> None:
        super().__init__(name, provenance(weights, "pt", 299, "pool3", 2048, "Inception-2015 (1008)"))
        net = inception_2015()
        _load(net, load_state(weights.path), weights.path)
        self.last: Any = net.fc
        net.fc = nn.Identity()
        self.net = net

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits."""
        features = self.net(resize.pt(images, 299) / 127.5 - 1)
        return features, F.linear(features, self.last.weight)


class Lite0(FeatureNetwork):
    """Spatial means of EfficientNet-lite0: stage 4 (112), stage 6 (320) or the head convolution (1280, with logits).

    The weights ship in a pip package, so this is the offline stand-in. Distances of different sizes or taps differ in
    scale and are never comparable.
    """

    BATCH = 64
    STAGES = {112: 5, 320: 7, 1280: 7}

    def __init__(self, name: str, weights: Weights, features: int, size: int) -> None:
        layer = {112: "blocks.4", 320: "blocks.6", 1280: "conv_head"}[features]
        super().__init__(name, provenance(weights, "clean", size, layer, features, {1280: "ImageNet-1k"}.get(features)))
        self.net = _timm("tf_efficientnet_lite0")
        _load(self.net, by_position(load_state(weights.path), self.net, weights.path), weights.path)
        self.to(memory_format=torch.channels_last)
        self.features, self.size = features, size

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and ImageNet logits from the 1280 features."""
        x = resize.clean(images, self.size) / 127.5 - 1
        x = self.net.bn1(self.net.conv_stem(x.contiguous(memory_format=torch.channels_last)))
        x = self.net.blocks[: self.STAGES[self.features]](x)
        if self.features != 1280:
            return x.mean(dim=(2, 3)), None
        pooled = self.net.bn2(self.net.conv_head(x)).mean(dim=(2, 3))
        return pooled, self.net.classifier(pooled)


class DinoV2(FeatureNetwork):
    """DINOv2 ViT class token at 224 px, with EDM2's antialiased bicubic resize of float images.

    `reduced` overrides timm's architecture; tests use a small one.
    """

    SIZE, GRID = 224, 16

    def __init__(self, name: str, weights: Weights, **reduced: Any) -> None:
        net = _timm("vit_large_patch14_dinov2", **{"img_size": self.SIZE, "num_classes": 0, **reduced})
        super().__init__(name, provenance(weights, "antialiased-bicubic", 224, "class token", net.num_features, None))
        state = {key: value for key, value in load_state(weights.path).items() if key != "mask_token"}
        if "pos_embed" in state:
            state["pos_embed"] = position_embedding(state["pos_embed"], self.GRID)
        _load(net, state, weights.path)
        self.net = net

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class token after the last normalisation."""
        x = F.interpolate(images.float(), size=(self.SIZE, self.SIZE), mode="bicubic", antialias=True)
        return self.net(normalised(x / 255, *IMAGENET)), None


def _timm(name: str, **architecture: Any) -> Any:
    import timm  # 37 MB that an evaluation by Inception does not need

    return timm.create_model(name, pretrained=False, **architecture)


def position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """DINOv2's resampling of its position embedding ``(1, 1 + m^2, d)`` to ``(1, 1 + grid^2, d)``.

    The published features sample at a scale of ``(grid + 0.1) / m``, without antialiasing; timm's own resampling
    does neither and gives other features.
    """
    token, patches = embedding[:, :1], embedding[:, 1:]
    m = round(patches.shape[1] ** 0.5)
    square = patches.reshape(1, m, m, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, scale_factor=(grid + 0.1) / m, mode="bicubic", antialias=False)
    return torch.cat([token, square.flatten(2).mT], dim=1)


def by_position(state: dict[str, Tensor], net: nn.Module, path: Path) -> dict[str, Tensor]:
    """`state` renamed to the keys of `net` by position: two implementations list the same tensors in the same order.

    Raises:
        UserError: the number or the shapes of the tensors differ.
    """
    own = net.state_dict()
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in own.values()]:
        raise UserError(f"{path} does not hold the {len(own)} tensors of this network: it belongs to another one")
    return dict(zip(own, state.values(), strict=True))


def _load(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this network: {str(error).splitlines()[1].strip()}") from error


NETWORKS: dict[str, tuple[str, Callable[[str, Weights], FeatureNetwork]]] = {
    "inception-2015-12-05": ("inception-2015-12-05", partial(TorchScriptInception, resize_name="tf1")),
    "inception-2015-12-05-clean": ("inception-2015-12-05", partial(TorchScriptInception, resize_name="clean")),
    "inception-pt": ("inception-pt", PortedInception),
    "lite0-320@32": ("efficientnet-lite0", partial(Lite0, features=320, size=32)),
    "lite0-320@64": ("efficientnet-lite0", partial(Lite0, features=320, size=64)),
    "lite0-1280@64": ("efficientnet-lite0", partial(Lite0, features=1280, size=64)),
    "lite0-112@64": ("efficientnet-lite0", partial(Lite0, features=112, size=64)),
    "dinov2-vitl14": ("dinov2-vitl14", DinoV2),
}
