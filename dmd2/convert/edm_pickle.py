"""The network in a pickle of NVlabs' EDM: its settings, and its tensors under EDM's names.

Such a file holds a dict with the network under ``ema``, beside what it was trained with (``loss_fn``, ``augment_pipe``,
``dataset_kwargs``). Every module comes with the source text of its class, which is not read. Instead, the attributes of
the modules are compared with those of the two architectures.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.data.inert_pickle import Record, Refused, read_inert, shown
from dmd2.networks.schedules import SIGMA_DATA

DEPTH = 8  # modules within modules; EDM's networks have five
# Attributes of all modules of the two networks that our networks have fixed.
ATTRIBUTES: dict[str, dict[str, float]] = {
    "DhariwalUNet": {"skip_scale": 1, "adaptive_scale": 1, "eps": 1e-5, "endpoint": 0, "max_positions": 10000},
    "SongUNet": {"skip_scale": math.sqrt(0.5), "adaptive_scale": 0, "eps": 1e-6, "endpoint": 1, "max_positions": 10000},
}


def read_edm(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of the network in a pickle, and its tensors named as in ``ema``.

    The settings are ``model_type`` (``DhariwalUNet``, which is ADM, or ``SongUNet``), ``img_resolution``,
    ``img_channels`` and ``label_dim`` (0 for none). Their types are not checked.

    Raises:
        UserError: see `read_pickle`; or there is no network, or it is not of a kind that we can convert.
    """
    holds = read_pickle(path)
    if not isinstance(holds, dict):
        raise UserError(f"{path} holds a {_kind(holds)} and not the dict of EDM's training with the network under ema")
    if "ema" not in holds:
        found = ", ".join(map(shown, holds)) or "nothing"
        raise UserError(f"{path} has no key ema: it holds {found}; name a snapshot of a network")
    ema, only = holds["ema"], "which we cannot convert: only"
    if not isinstance(ema, Record) or ema.kind != "EDMPrecond":
        own = "networks trained with EDM's own preconditioning, EDMPrecond"
        raise UserError(f"{path}: ema is a {_kind(ema)}, {only} {own}")
    model = _dict(path, "ema", ema.state, "_modules").get("model")
    if not isinstance(model, Record) or model.kind not in ATTRIBUTES:
        raise UserError(f"{path}: ema.model is a {_kind(model)}, {only} {' or '.join(ATTRIBUTES)}")
    state: dict[str, Tensor] = {}
    for name, module in _modules(path, "", ema, set()):
        _check(path, name, module, model.kind)
        hidden = module.state.get("_non_persistent_buffers_set", ())
        tensors = _dict(path, name, module.state, "_parameters") | {
            own: value for own, value in _dict(path, name, module.state, "_buffers").items() if own not in hidden
        }
        for own, value in tensors.items():
            if value is not None:
                if not isinstance(value, Tensor):
                    raise UserError(f"{path}: {name}.{own} is a {_kind(value)} and not a tensor")
                state[f"{name}.{own}".lstrip(".")] = value
    if (sigma_data := ema.state.get("sigma_data")) != SIGMA_DATA:
        raise UserError(f"{path}: ema.sigma_data is {shown(sigma_data)}, our preconditioning has {SIGMA_DATA}")
    said = {key: ema.state.get(key) for key in ("img_resolution", "img_channels", "label_dim")}
    return {"model_type": model.kind, **said}, state


def read_pickle(path: Path) -> Any:
    """What a pickle holds, see `read_inert`.

    Raises:
        UserError: it is missing, truncated, no pickle, or names something that is no tensor or plain container.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == b"PK\x03\x04":
                raise UserError(
                    f"{path} is a zip archive, as torch.save writes, and no pickle: name it .bin if it is one"
                )
            return read_inert(data)
    except Refused as refused:
        raise UserError(
            f"{path} {refused}: refused; a file of NVlabs holds only tensors and plain containers"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): download it again") from None
    except ValueError as error:  # also of an empty file, which cannot be mapped
        raise UserError(f"{path} is truncated or no pickle ({error}): download it again") from None


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Record) else type(value).__name__


def _dict(path: Path, name: str, state: dict[str, Any], key: str) -> dict[Any, Any]:
    value = state.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(own, str) and own.isprintable() for own in value):
        raise UserError(f"{path}: {name}.{key} is a {_kind(value)} and not a dict with names")
    return value


def _modules(path: Path, name: str, module: Any, seen: set[int]) -> Iterator[tuple[str, Record]]:
    """A module and all below it, with their names; none may occur twice."""
    if not isinstance(module, Record) or id(module) in seen or name.count(".") > DEPTH:
        raise UserError(f"{path}: ema.{name} is no module of its own, but {_kind(module)} again or too deep")
    seen.add(id(module))
    yield name, module
    for own, child in _dict(path, name, module.state, "_modules").items():
        if child is not None:
            yield from _modules(path, f"{name}.{own}".lstrip("."), child, seen)


def _check(path: Path, name: str, module: Record, network: str) -> None:
    """Compare a module's attributes with those of the architecture."""
    state = module.state
    wanted: dict[str, Any] = dict(ATTRIBUTES[network])
    if module.kind == "GroupNorm":
        norm = state.get("_parameters", {}).get("weight")
        wanted["num_groups"] = min(32, len(norm) // 4) if isinstance(norm, Tensor) and norm.ndim else None
    if module.kind == "Conv2d":
        wanted["fused_resample"] = name.endswith("_aux_residual")
    if (
        module.kind == "UNetBlock"
        and isinstance(width := state.get("out_channels"), int)
        and "qkv" in state.get("_modules", ())
    ):
        wanted["num_heads"] = width // 64 if network == "DhariwalUNet" else 1
    for key, value in wanted.items():
        found = state.get(key, value)
        if not isinstance(found, int | float) or value is None or not math.isclose(found, value, rel_tol=1e-6):
            raise UserError(f"{path}: ema.{name}.{key} is {shown(found)}, in EDM's {network} it is {value}")
