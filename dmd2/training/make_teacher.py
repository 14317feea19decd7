"""Makes a teacher: trains one at small scale, converts a published network, or adopts a diffusers UNet of the user."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from dmd2.core.errors import UserError
from dmd2.core.files import content_of, digest_of, listing, read_json, sha256, write_json
from dmd2.core.progress import Progress
from dmd2.core.rng import Draws
from dmd2.data.pipelines import belongs
from dmd2.data.sets import TensorSet, load_set
from dmd2.experiment.checks.network import network_problems
from dmd2.experiment.config import Data, Optim, Teacher
from dmd2.experiment.run_inputs import pipeline_manifest
from dmd2.experiment.teacher_config import TeacherTraining
from dmd2.method.objectives.denoising import denoising_loss
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import SAMPLING, Denoiser, EdmDenoiser
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import LEVELS, add_noise, logit_normal, loss_weight, shifted
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.optimiser import Optimiser
from dmd2.training.teachers import build_network, unconditional, wrap

CHECKPOINT_EVERY = 500


def train_teacher(
    data: Data, teacher: Teacher, real_manifest: Path, folder: Path, device: torch.device | str = "cpu"
) -> Path:
    """Train a small teacher with its denoising loss and an EMA of its weights; resumes after a kill.

    EDM: ``ln sigma ~ N(p_mean, p_std)`` and weight 1/c_out^2 (Karras et al. 2022, Table 1). eps: uniform t, noise MSE.
    flow: ``logit u ~ N(p_mean, p_std)``, sigma is u shifted, velocity MSE (Esser et al. 2024, Sec. 3.1).

    Its checkpoints are named by the settings and by the content of all that it reads: images, their conditions, and the
    unconditional condition that replaces dropped ones.
    """
    spec = teacher.train
    assert spec is not None and teacher.network is not None
    form, precision = teacher.parameterisation, SAMPLING[spec.precision]
    networks = (build_network(teacher.network, spec.seed) for _ in range(2))
    denoiser, ema = (wrap(network, form, precision, **teacher.flow).to(device) for network in networks)
    denoiser.train()
    ema.requires_grad_(False)
    optim = Optim(
        lr=spec.lr,
        batch=spec.batch,
        warmup=spec.warmup,
        ticks_per_iteration=1,
        clip=1.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        ema=None,
    )
    optimiser = Optimiser([denoiser], optim, spec.lr)
    real, pipeline = load_set(real_manifest), pipeline_manifest(data)
    read = [content_of(real_manifest), data.classes, None if pipeline is None else content_of(pipeline)]
    weighed = {"parameterisation", "network", "train", "shift", "guidance_embed"}
    identity = digest_of([teacher.settings(include=weighed), *read])
    checkpoints = Checkpoints(folder / f"checkpoints-{identity}")
    done = 0
    if state := checkpoints.load_latest():
        denoiser.load_state_dict(state["denoiser"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
    null = unconditional(data).to(torch.device(device)) if spec.label_dropout > 0 else None
    progress, started = Progress(f"teacher {teacher.name}", spec.steps, done), time.monotonic()
    for it in range(done, spec.steps):
        loss = _denoising_step(denoiser, real, Draws(spec.seed, it, spec.batch, 0, spec.batch, device), null, spec)
        loss.backward()
        optimiser.step(it)
        decay = min(spec.ema, (1 + it) / (10 + it))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in denoiser.parameters()], 1 - decay)
        progress.update(it + 1, {"loss": loss.detach()})
        if ((it + 1) % CHECKPOINT_EVERY == 0 or it + 1 == spec.steps) and not torch.isfinite(loss):
            raise UserError(f"teacher {teacher.name}: the loss is {loss.item()} at step {it + 1}; lower train.lr")
        if (it + 1) % CHECKPOINT_EVERY == 0:
            state = {"denoiser": denoiser.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
            checkpoints.save(it + 1, {**state, "step": it + 1})
    ema.network.save_pretrained(folder / "unet", safe_serialization=True)
    about = {"seconds": round(time.monotonic() - started, 1), "steps": spec.steps, "precision": spec.precision}
    return _manifest(folder, "unet", about)


def _denoising_step(
    denoiser: Denoiser, real: TensorSet, draws: Draws, null: Condition | None, spec: TeacherTraining
) -> torch.Tensor:
    indices = draws.shuffled("teacher/real", len(real))
    x, cond = real.batch(indices, draws.device)
    if spec.label_dropout > 0 and null is not None:
        dropped = draws.integers("teacher/dropout", 0, 9999) < spec.label_dropout * 10000
        cond = cond.where(dropped, null)
    if isinstance(denoiser, EdmDenoiser):
        t, kind = (draws.normal("teacher/level", ()) * spec.p_std + spec.p_mean).exp(), "edm"
    elif isinstance(denoiser, FlowDenoiser):
        u = logit_normal(draws.normal("teacher/level", ()), (spec.p_mean, spec.p_std))
        t, kind = shifted(u, denoiser.schedule.shift), "v"
    else:
        t, kind = draws.integers("teacher/level", 0, LEVELS - 1), "eps"
    x_t = add_noise(denoiser.schedule, x, draws.normal("teacher/noise", tuple(x.shape[1:])), t)
    return denoising_loss(denoiser(x_t, t, cond), x, loss_weight(denoiser.schedule, t, kind))  # type: ignore[arg-type]


def adopt_teacher(teacher: Teacher, folder: Path, data: Data | None = None) -> Path:
    """Write the manifest of the diffusers UNet at ``folder/unet``: the user's, or converted from ``teacher.source``.

    A source that is a diffusers folder already, for example the UNet of a pipeline, is used where it lies.

    Raises:
        UserError: neither is there, or the network is not what ``teacher.network`` says or is not of `data`.
    """
    unet, extra = folder / "unet", dict[str, Any]()
    source = Path(teacher.source) if teacher.source else None
    if source is not None and (source / "config.json").exists():
        unet = source
    else:
        if source is not None:
            extra = _convert(teacher.name, source, folder)
        if not (unet / "config.json").exists():
            place = f", or {source.name} at {source}" if source else ""
            raise UserError(f"teacher {teacher.name}: put a diffusers UNet (config.json, safetensors) at {unet}{place}")
    config = read_json(unet / "config.json")
    for key, wanted in teacher.settings().get("network", {}).items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"teacher {teacher.name}: {unet} has {key} {config[key]}, teacher.network says {wanted}")
    guided = "teacher.guidance" if teacher.guidance > 1 else None
    for *_, told in network_problems(config, data, guided) if data is not None else ():
        raise UserError(f"teacher {teacher.name}: {unet}: {told}")
    return _manifest(folder, os.path.relpath(unet, folder), extra)


def _convert(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Convert `source` to ``folder/unet``, unless the user put that there or it was converted from this very file.

    Returns the source's path and checksum for the manifest; nothing for the user's own network.
    """
    unet, note = folder / "unet", folder / "converted.json"
    there = (unet / "config.json").exists()
    known = read_json(note) if there and note.exists() else {}
    if not source.exists():
        if known.get("path", str(source)) != str(source):
            raise UserError(
                f"teacher {name}: {unet} was converted from {known['path']}, teacher.source says {source}: put it there"
            )
    elif not there or (known and known["sha256"] != sha256(source)):
        from dmd2.convert.unets import convert  # reads formats that no other teacher needs

        convert(source, unet)
        known = {"path": str(source), "sha256": sha256(source)}
        write_json(note, known)
    return {"source": known} if known else {}


def _manifest(folder: Path, name: str, extra: dict[str, Any]) -> Path:
    files = [folder / name / p.name for p in sorted((folder / name).iterdir()) if belongs(p)]
    kind = json.loads((folder / name / "config.json").read_text())["_class_name"]
    value = {"kind": "teacher", "folder": name, "class": kind, **extra, "files": listing(files, folder)}
    write_json(folder / "manifest.json", value)
    return folder / "manifest.json"
