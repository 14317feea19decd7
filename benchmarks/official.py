"""The official ImageNet-64 procedure of DMD2, run from a checkout that the user brings; nothing of it is stored here.

The step is `Trainer.train_one_step` of tianweiy/DMD2 (8d8fa55), called on a stand-in that holds what it reads. So the
order of turns, losses, clipping and updates are its own; no data loader and no logging run. Its code and that of
NVlabs/edm are under non-commercial licences.
"""

import contextlib
import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from dmd2.core.errors import UserError

OWN = {"main", "third_party", "dnnlib", "torch_utils", "training"}  # packages of the checkouts
NEVER = 10**9  # iterations between two logs
# experiments/imagenet/imagenet_gan_classifier_genloss3e-3_diffusion1000_lr2e-6_scratch.sh
SETTINGS = {
    "dataset_name": "imagenet", "label_dim": 1000, "use_fp16": True, "sigma_data": 0.5, "sigma_min": 0.002,
    "sigma_max": 80.0, "rho": 7.0, "num_train_timesteps": 1000, "min_step_percent": 0.02, "max_step_percent": 0.98,
    "gan_classifier": True, "diffusion_gan": True, "diffusion_gan_max_timestep": 1000, "initialie_generator": True,
    "model_id": "",
}  # fmt: skip


class Stub(ModuleType):
    """A module that is imported and not used: every name in it is one, too, and calling it gives it back."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def imported(name: str) -> ModuleType:
    """A module of the checkout; what it imports and is not installed (wandb, accelerate, ...) is stubbed.

    Raises:
        UserError: it is not there.
    """
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if missing.split(".")[0] in OWN:
                raise UserError(f"--official is no checkout of tianweiy/DMD2: it has no module {missing}") from None
            sys.modules[missing] = Stub(missing)


def use(checkout: Path, edm: Path | None) -> None:
    """Make the checkouts importable; an `edm` of its own gets what DMD2's copy adds to it.

    Raises:
        UserError: there is no EDM network.
    """
    sys.path.insert(0, str(checkout.resolve()))
    if edm is None:
        if not (checkout / "third_party/edm/training/networks.py").exists():
            raise UserError(f"{checkout}/third_party/edm is empty: bring a checkout of NVlabs/edm, --edm PATH")
        return
    for name, folder in {"third_party": checkout / "third_party", "third_party.edm": edm}.items():
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(folder.resolve())]
    adapt(imported("third_party.edm.training.networks"))


def adapt(networks: Any) -> None:
    """Let NVlabs' EDM networks run in bfloat16 where they would in float16, and give their bottleneck."""

    class Lowered(ModuleType):
        float16 = torch.bfloat16

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    class Bottleneck(Exception):
        pass

    networks.torch = Lowered("torch")
    plain = networks.EDMPrecond.forward

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise Bottleneck(args[0])

    def forward(self: Any, *args: Any, return_bottleneck: bool = False, **kwargs: Any) -> Any:
        if not return_bottleneck:
            return plain(self, *args, **kwargs)
        hook = next(iter(self.model.dec.values())).register_forward_pre_hook(stop)
        try:
            return plain(self, *args, **kwargs)
        except Bottleneck as found:
            return found.args[0]
        finally:
            hook.remove()

    networks.EDMPrecond.forward = forward


def random_network(args: SimpleNamespace, build: Any) -> nn.Module:
    """A network whose weights are random, those included that start at zero."""
    network = build(args)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def unified(args: SimpleNamespace, tiny: dict[str, Any] | None) -> nn.Module:
    """Its model of generator and guidance, whose weights are drawn instead of read from EDM's pickle.

    A `tiny` network, for a trial on a CPU, has that config and a linear head of its own.
    """
    network, guidance = imported("main.edm.edm_network"), imported("main.edm.edm_guidance")
    if tiny is not None:
        network.get_imagenet_edm_config = lambda: tiny
    guidance.dnnlib.util.open_url = lambda *_: contextlib.nullcontext()
    guidance.pickle = SimpleNamespace(load=lambda _: {"ema": random_network(args, network.get_edm_network)})
    model = imported("main.edm.edm_unified_model").EDMUniModel(args, None)
    if tiny is not None:
        width, side = (
            tiny["model_channels"] * tiny["channel_mult"][-1],
            args.resolution >> len(tiny["channel_mult"]) - 1,
        )
        model.guidance_model.cls_pred_branch = nn.Conv2d(width, 1, side)
    return model


class Official:
    """The official training of ImageNet-64 on random images that lie on the device.

    Raises:
        UserError: the checkout is none.
    """

    def __init__(
        self, batch: int, resolution: int, ratio: int, device: torch.device, tiny: dict[str, Any] | None = None
    ) -> None:
        args = SimpleNamespace(**SETTINGS, resolution=resolution)
        self.trainer, model = imported("main.edm.train_edm").Trainer, unified(args, tiny).to(device)
        halves = {"generator": model.feedforward_model, "guidance": model.guidance_model}
        held: dict[str, Any] = {}
        for name, module in halves.items():
            trained = [p for p in module.parameters() if p.requires_grad]
            held[f"optimizer_{name}"] = made = torch.optim.AdamW(trained, 2e-6, (0.9, 0.999), weight_decay=0.01)
            held[f"scheduler_{name}"] = get_scheduler("constant_with_warmup", made, 500, NEVER)
        rows = {"images": torch.rand(batch, 3, resolution, resolution, device=device),
                "class_labels": torch.randint(args.label_dim, (batch, 1), device=device)}  # fmt: skip
        accelerator = SimpleNamespace(
            device=device, is_main_process=False, backward=lambda loss: loss.backward(),
            clip_grad_norm_=nn.utils.clip_grad_norm_, wait_for_everyone=lambda: None, gather=lambda tensor: tensor,
        )  # fmt: skip
        self.state = SimpleNamespace(
            **held, model=model, accelerator=accelerator, real_image_dataloader=itertools.repeat(rows),
            eye_matrix=torch.eye(args.label_dim, device=device), batch_size=batch, resolution=resolution,
            conditioning_sigma=80.0, label_dim=args.label_dim, dfake_gen_update_ratio=ratio, gan_classifier=True,
            gen_cls_loss_weight=3e-3, cls_loss_weight=1e-2, max_grad_norm=10, wandb_iters=NEVER, step=ratio,
        )  # fmt: skip

    def iterate(self) -> None:
        """One iteration of its own; the first one updates the generator."""
        self.trainer.train_one_step(self.state)
        self.state.step += 1
