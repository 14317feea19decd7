"""EDM's two networks, written a second time as functions of a state dict with EDM's names, and the pickles it makes.

Slow and plain on purpose: box filters are means, attention is written out, nothing is shared with the code under test.
"""

import math
import pickle
import sys
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SONG = {"model": "SongUNet", "size": 8, "width": 16, "mult": [2, 2], "layers": 1, "attention": [4], "labels": 5}
VP = {**SONG, "fourier": False, "residual": False, "taps": [1, 1], "noise": 16}
VE = {**SONG, "fourier": True, "residual": True, "taps": [1, 3, 3, 1], "noise": 32}
ADM = {"model": "DhariwalUNet", "size": 8, "width": 128, "mult": [1, 2], "layers": 1, "attention": [4], "labels": 5,
       "taps": [1, 1], "noise": 128}  # fmt: skip


class Shapes(dict):
    """Name -> shape of every entry of the network's state dict."""

    def __init__(self, spec, channels=3, augment=0):
        self.spec, self.song, w, emb = spec, spec["model"] == "SongUNet", spec["width"], 4 * spec["width"]
        if spec.get("fourier"):
            self["map_noise.freqs"] = (spec["noise"] // 2,)
        if spec["labels"]:
            self.add("map_label", spec["noise"] if self.song else emb, spec["labels"], bias=self.song)
        if augment:
            self.add("map_augment", spec["noise"], augment, bias=False)
        self.add("map_layer0", emb, spec["noise"])
        self.add("map_layer1", emb, emb)
        sizes = [spec["size"] >> i for i in range(len(spec["mult"]))]
        self.add(f"enc.{sizes[0]}x{sizes[0]}_conv", w if self.song else w * spec["mult"][0], channels, 3, 3)
        width = self.decoder(sizes, *self.encoder(sizes, channels))
        norm, conv = [f"dec.{sizes[0]}x{sizes[0]}_aux_{n}" if self.song else f"out_{n}" for n in ("norm", "conv")]
        self.add(norm, width)
        self.add(conv, channels, width, 3, 3)

    def add(self, name, *shape, bias=True):
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def block(self, name, a, b, attention=False, resample=False):
        self.add(f"{name}.norm0", a)
        self.add(f"{name}.conv0", b, a, 3, 3)
        if resample:
            for part in ("conv0", "skip"):
                self[f"{name}.{part}.resample_filter"] = (1, 1, *[len(self.spec["taps"])] * 2)
        self.add(f"{name}.affine", b if self.song else 2 * b, 4 * self.spec["width"])
        self.add(f"{name}.norm1", b)
        self.add(f"{name}.conv1", b, b, 3, 3)
        if a != b or (resample and self.song):
            self.add(f"{name}.skip", b, a, 1, 1)
        if attention:
            self.add(f"{name}.norm2", b)
            self.add(f"{name}.qkv", 3 * b, b, 1, 1)
            self.add(f"{name}.proj", b, b, 1, 1)

    def encoder(self, sizes, above):
        spec, width, skips = self.spec, self.spec["width"], [self.spec["width"]]
        for level, r in enumerate(sizes):
            if level:
                self.block(f"enc.{r}x{r}_down", width, width, resample=True)
                if spec.get("residual"):
                    self.add(f"enc.{r}x{r}_aux_residual", width, above, 3, 3)
                    self[f"enc.{r}x{r}_aux_residual.resample_filter"] = (1, 1, 4, 4)
                    above = width
                skips.append(width)
            for i in range(spec["layers"]):
                self.block(f"enc.{r}x{r}_block{i}", width, spec["width"] * spec["mult"][level], r in spec["attention"])
                width = spec["width"] * spec["mult"][level]
                skips.append(width)
        return width, skips

    def decoder(self, sizes, width, skips):
        spec, r = self.spec, sizes[-1]
        self.block(f"dec.{r}x{r}_in0", width, width, True)
        self.block(f"dec.{r}x{r}_in1", width, width)
        for level, r in reversed(list(enumerate(sizes))):
            if level < len(sizes) - 1:
                self.block(f"dec.{r}x{r}_up", width, width, resample=True)
            for i in range(spec["layers"] + 1):
                attention = r in spec["attention"] and (not self.song or i == spec["layers"])
                self.block(f"dec.{r}x{r}_block{i}", width + skips.pop(), spec["width"] * spec["mult"][level], attention)
                width = spec["width"] * spec["mult"][level]
        return width


def random_state(spec, seed=0, **options):
    """A state dict in which no layer is zero: also those are drawn that EDM starts at zero."""
    g, state = torch.Generator().manual_seed(seed), {}
    taps = torch.tensor(spec["taps"], dtype=torch.float32)
    for name, shape in Shapes(spec, **options).items():
        if name.endswith("resample_filter"):
            state[f"model.{name}"] = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
        else:
            scale = 16 if "freqs" in name else 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2
            state[f"model.{name}"] = torch.randn(shape, generator=g) * scale + (
                "norm" in name and name.endswith("weight")
            )
    return state


class Network:
    """F of EDM for a state dict: ``network(x, c_noise, one_hot)``; `encoded` is then the last encoder block's output."""

    def __init__(self, spec, state):
        self.spec, self.song = spec, spec["model"] == "SongUNet"
        self.state = {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].flatten(1).T + self.state.get(f"{name}.bias", 0.0)

    def conv(self, name, x, padding=1):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), padding=padding)

    def norm(self, name, x):
        groups = x.reshape(x.shape[0], min(32, x.shape[1] // 4), -1)
        var, mean = torch.var_mean(groups, dim=2, keepdim=True, correction=0)
        x = ((groups - mean) / (var + (1e-6 if self.song else 1e-5)).sqrt()).reshape(x.shape)
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def half(self, x, pad=None):
        """Low-pass filter and every second pixel, from the taps alone."""
        taps = torch.tensor(self.spec["taps"]) / sum(self.spec["taps"])
        pad = (len(taps) - 1) // 2 if pad is None else pad
        x = F.pad(x, (pad,) * 4)
        for axis in (2, 3):
            count = (x.shape[axis] - len(taps)) // 2 + 1
            x = sum(t * x.narrow(axis, i, 2 * count - 1).unfold(axis, 1, 2)[..., 0] for i, t in enumerate(taps))
        return x

    def double(self, x):
        """The adjoint of `half`, times 4 (zeros between pixels, then the filter)."""
        probe = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype, requires_grad=True)
        with torch.enable_grad():
            (up,) = torch.autograd.grad(self.half(probe), probe, 4 * x)
        return up

    def block(self, name, x, emb):
        change = self.half if name.endswith("_down") else self.double if name.endswith("_up") else lambda x: x
        h = self.conv(f"{name}.conv0", change(F.silu(self.norm(f"{name}.norm0", x))))
        affine = self.linear(f"{name}.affine", emb)[..., None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + affine)
        else:
            scale, shift = affine[:, : h.shape[1]], affine[:, h.shape[1] :]
            h = self.norm(f"{name}.norm1", h) * (1 + scale) + shift
        h = self.conv(f"{name}.conv1", F.silu(h))
        x = change(x)
        x = h + (self.conv(f"{name}.skip", x, 0) if f"{name}.skip.weight" in self.state else x)
        x = x * (math.sqrt(0.5) if self.song else 1)
        if f"{name}.qkv.weight" not in self.state:
            return x
        heads = 1 if self.song else x.shape[1] // 64
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 0).reshape(
            x.shape[0], heads, -1, 3, x[0, 0].numel()
        )
        q, k, v = rows[:, :, :, 0], rows[:, :, :, 1], rows[:, :, :, 2]
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(dim=3)
        x = x + self.conv(f"{name}.proj", (v @ weights.transpose(2, 3)).reshape(x.shape), 0)
        return x * (math.sqrt(0.5) if self.song else 1)

    def embedding(self, noise, one_hot):
        n = self.spec["noise"] // 2
        if self.spec.get("fourier"):
            freqs = 2 * math.pi * self.state["map_noise.freqs"]
        else:
            freqs = 10000.0 ** -(torch.arange(n) / (n - 1 if self.song else n))
        phase = noise[:, None] * freqs
        emb = torch.cat([phase.sin(), phase.cos()] if self.song else [phase.cos(), phase.sin()], dim=1)
        if self.song and self.spec["labels"]:
            emb = emb + self.linear("map_label", one_hot * math.sqrt(self.spec["labels"]))
        emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb)))
        if not self.song and self.spec["labels"]:
            emb = emb + self.linear("map_label", one_hot)
        return F.silu(emb)

    def __call__(self, x, noise, one_hot=None):
        emb, sizes = self.embedding(noise, one_hot), [self.spec["size"] >> i for i in range(len(self.spec["mult"]))]
        above, x = x, self.conv(f"enc.{sizes[0]}x{sizes[0]}_conv", x)
        skips = [x]
        for level, r in enumerate(sizes):
            if level:
                x = self.block(f"enc.{r}x{r}_down", x, emb)
                if self.spec.get("residual"):
                    name = f"enc.{r}x{r}_aux_residual"
                    wide = F.conv2d(above, self.state[f"{name}.weight"], padding=2)
                    x = above = (x + self.half(wide, 0) + self.state[f"{name}.bias"][:, None, None]) / math.sqrt(2)
                skips.append(x)
            for i in range(self.spec["layers"]):
                x = self.block(f"enc.{r}x{r}_block{i}", x, emb)
                skips.append(x)
        self.encoded = x
        x = self.block(f"dec.{r}x{r}_in1", self.block(f"dec.{r}x{r}_in0", x, emb), emb)
        for level, r in enumerate(reversed(sizes)):
            if level:
                x = self.block(f"dec.{r}x{r}_up", x, emb)
            for i in range(self.spec["layers"] + 1):
                x = self.block(f"dec.{r}x{r}_block{i}", torch.cat([x, skips.pop()], dim=1), emb)
        norm, conv = (f"dec.{r}x{r}_aux_norm", f"dec.{r}x{r}_aux_conv") if self.song else ("out_norm", "out_conv")
        return self.conv(conv, F.silu(self.norm(norm, x)))


def denoised(network, x, sigma, one_hot=None):
    """D of Karras et al. (2022), Eq. 7, sigma_data 0.5."""
    s = sigma[:, None, None, None]
    raw = network(x / (s**2 + 0.25).sqrt(), sigma.log() / 4, one_hot)
    return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * raw


class Persistent:
    """An object whose pickle has the form of NVlabs' persistence."""

    def __init__(self, kind, **state):
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('ran')", "class_name": kind}
        self.meta["state"] = state

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


@contextmanager
def names_of_nvlabs():
    """Modules with the names that EDM's pickles call for, while one is written."""
    made = {}
    for module, name in (("torch_utils.persistence", "_reconstruct_persistent_obj"), ("dnnlib.util", "EasyDict")):
        made[module] = ModuleType(module)
        kind = type(name, (dict,), {}) if name == "EasyDict" else (lambda meta: None)
        kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
        setattr(made[module], name, kind)
        made[module.partition(".")[0]] = ModuleType(module.partition(".")[0])
    sys.modules.update(made)
    try:
        yield made["dnnlib.util"].EasyDict
    finally:
        for name in made:
            del sys.modules[name]


def module(kind, tensors, children, **attributes):
    """A module's attributes as torch keeps them."""
    buffers = {name: tensor for name, tensor in tensors.items() if name in ("resample_filter", "freqs")}
    parameters = {name: nn.Parameter(tensor, False) for name, tensor in tensors.items() if name not in buffers}
    state = {
        "training": False, "_parameters": OrderedDict(parameters), "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(), "_forward_hooks": OrderedDict(), "_modules": OrderedDict(children),
        "_init_args": (), "_init_kwargs": {}, **attributes,
    }  # fmt: skip
    if kind == "ModuleDict":
        made = nn.ModuleDict()
        made.__dict__.update(state)  # past the check that they are modules
        return made
    return Persistent(kind, **state)


def tree(spec, state, name=""):
    """The persistent modules of a network, from its names."""
    inner = {key.removeprefix(f"{name}.") if name else key: tensor for key, tensor in state.items()}
    own = {key: tensor for key, tensor in inner.items() if "." not in key}
    children = {}
    for child in dict.fromkeys(key.partition(".")[0] for key in inner if "." in key):
        below = {key.partition(".")[2]: tensor for key, tensor in inner.items() if key.startswith(f"{child}.")}
        children[child] = tree(spec, {f"{child}.{key}": tensor for key, tensor in below.items()}, child)
    song = spec["model"] == "SongUNet"
    if name in ("enc", "dec"):
        return module("ModuleDict", own, children)
    if "affine" in children:
        heads = {"num_heads": 1 if song else len(state[f"{name}.norm2.weight"]) // 64} if "qkv" in children else {}
        scale = np.sqrt(0.5) if song else 1
        return module("UNetBlock", own, children, skip_scale=scale, adaptive_scale=not song, **heads,
                      out_channels=len(state[f"{name}.norm1.weight"]))  # fmt: skip
    if "norm" in name:
        groups = min(32, len(own["weight"]) // 4)
        return module("GroupNorm", own, children, num_groups=groups, eps=1e-6 if song else 1e-5)
    if "map_layer0" in children:
        return module(spec["model"], own, children, label_dropout=0)
    return module("Linear" if name.startswith(("map_l", "map_a", "affine")) else "Conv2d", own, children,
                  **({} if "map" in name else {"fused_resample": name.endswith("residual")}))  # fmt: skip


def write(path: Path, spec, state, protocol=4, kind="EDMPrecond", drop=(), **attributes):
    """Write a pickle as EDM's training does, with what it holds beside the network."""
    with names_of_nvlabs() as easy:
        said = {"img_resolution": spec["size"], "img_channels": 3, "label_dim": spec["labels"], "use_fp16": True,
                "sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5}  # fmt: skip
        bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        ema = module(kind, {}, {"model": tree(spec, bare)}, **{**said, **attributes})
        data = {"ema": ema, "loss_fn": Persistent("EDMLoss", P_mean=-1.2), "augment_pipe": Persistent("AugmentPipe", p=0.1),
                "dataset_kwargs": easy(class_name="training.dataset.ImageFolderDataset", use_labels=True)}  # fmt: skip
        path.write_bytes(pickle.dumps({key: value for key, value in data.items() if key not in drop}, protocol))
    return path
