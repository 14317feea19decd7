"""Publish a finished student: a folder of diffusers parts with a model card and a script that needs only diffusers."""

import inspect
import runpy
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel

from dmd2.convert.kohya import write_kohya
from dmd2.core.errors import UserError
from dmd2.core.files import atomic_folder
from dmd2.data.sets import save_shard
from dmd2.experiment.method_config import Generator
from dmd2.networks.denoisers import Denoiser, EdmDenoiser
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.lora import adapter_state
from dmd2.networks.quantise import quantise
from dmd2.networks.schedules import BETA_END, BETA_START, LEVELS, RHO, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, FlowSchedule
from dmd2.networks.song_unet import SongUNet
from dmd2.publish.model_card import model_card
from dmd2.publish.template import TEMPLATES, template
from dmd2.training.sampling import student_sample
from dmd2.training.snapshot import Snapshot

PARTS = ("unet", "transformer")  # folder of the network
SINGLE, LORA = "unet_fp16.safetensors", "lora_fp16.safetensors"  # as the paper's authors published their students
ADAPTER = "lora.safetensors"  # factors of a transformer, in float32
TOLERANCE = 1e-4  # of the largest value; float32 through another order of operations stays below 1e-5


def export_folder(target: Path, force: bool = False) -> AbstractContextManager[Path]:
    """An `atomic_folder` that replaces an earlier export, and only by `force`."""
    network = any((target / part / "config.json").exists() for part in PARTS)
    is_export = network and (target / "sample.py").exists()
    refusal = "is no export: name a new folder" if force else "exists: name a new folder, or replace it with --force"
    return atomic_folder(target, force and is_export, refusal)


def scheduler_of(
    student: Denoiser, generator: Generator
) -> EDMEulerScheduler | LCMScheduler | FlowMatchEulerDiscreteScheduler:
    """The diffusers scheduler with this student's noise levels and clean prediction.

    EDM: the preconditioning of `EDMEulerScheduler` is Karras et al. (2022), Eq. 7. eps: the ``denoised`` of
    `LCMScheduler` is x0 once its boundary term c_skip is negligible, which a large timestep_scaling makes it down to
    t = 1; with 1000 original steps its own grid of n steps is ours wherever n divides 1000. flow: stochastic sampling
    is `few_step`.
    """
    if isinstance(student, FlowDenoiser):
        return FlowMatchEulerDiscreteScheduler(
            shift=student.schedule.shift, stochastic_sampling=generator.sampler == "renoise" and generator.steps > 1
        )
    if isinstance(student, EdmDenoiser):
        return EDMEulerScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, rho=RHO)
    return LCMScheduler(
        num_train_timesteps=LEVELS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        original_inference_steps=LEVELS,
        timestep_scaling=1e4,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sampling_of(snapshot: Snapshot, student: Denoiser) -> dict[str, Any]:
    """Everything the sampling script depends on."""
    cfg, network = snapshot.cfg, student.network
    text, labelled, edm = cfg.data.text, cfg.data.labelled, isinstance(student, EdmDenoiser)
    flow, steps = isinstance(student, FlowDenoiser), cfg.generator.steps
    times = student.schedule.step_times(steps, cfg.generator.time)
    how = snapshot.metrics["protocol"] if snapshot.metrics else {"labels": "cyclic", "rounding": "round"}
    sized = isinstance(network, UNet2DConditionModel) and network.config["addition_embed_type"] == "text_time"
    stock = text is not None and cfg.data.latents and text.pipeline.encoder is None
    # The factors of a student of another run's student are not those of the teacher.
    own_lora = text is not None and cfg.generator.lora is not None and cfg.train.init_from is None
    unets = "StableDiffusionXLPipeline" if sized else "StableDiffusionPipeline"
    return {
        "cfg": cfg,
        "edm": edm,
        "flow": flow,
        "part": PARTS[flow],
        "levels": "TIMESTEPS" if not edm and not flow else "SIGMAS",
        "called_at": times,
        "fresh": steps - 1 if cfg.generator.sampler == "renoise" else 0,  # draws of noise between steps
        "labelled": labelled,
        "seeded": text is None,  # noise and classes follow from seeds alone
        "text": text is not None,
        "sized": sized,
        "takes_labels": labelled and getattr(network, "class_embedding", None) is not None,
        "pixels": cfg.data.channels in (1, 3) and not cfg.data.latents,
        "network": type(network).__name__,
        "scheduler": type(scheduler_of(student, cfg.generator)).__name__,
        "times": unshifted(steps) if flow else times if edm else [int(t) for t in times],
        "labels": "random" if how["labels"] == "random" else "cyclic",
        "rounding": how["rounding"],
        "dtype": "bfloat16" if flow and cfg.train.precision.startswith("bf16") else "float32",
        "tokens": text.pipeline.max_sequence_length if flow and stock and text is not None else None,
        "pipeline": (student.family.pipeline if isinstance(student, FlowDenoiser) else unets) if stock else None,
        "single": SINGLE,
        "lora": LORA if own_lora and not flow else None,
        "no_loader": None,
        **(_of_flow(student, cfg.generator, own_lora) if isinstance(student, FlowDenoiser) else {}),
    }


def unshifted(steps: int) -> list[float]:
    """Levels of a student of a flow before their shift, which diffusers' scheduler applies itself."""
    return [round(level, 6) for level in FlowSchedule().step_times(steps, 1.0)]


def _of_flow(student: FlowDenoiser, generator: Generator, own_lora: bool) -> dict[str, Any]:
    """What card and script tell of a flow alone.

    unguided: what its pipeline calls no guidance. wrong: levels that a number of steps alone would make, if not ours.
    no_loader: the family's pipeline, if there are factors that it cannot load.
    """
    kind = student.family.pipeline
    loads = hasattr(getattr(diffusers, kind), "load_lora_weights")
    scheduler = scheduler_of(student, generator)
    scheduler.set_timesteps(generator.steps)
    alone, ours = scheduler.sigmas[:-1].tolist(), student.schedule.step_times(generator.steps, 1.0)
    differ = any(abs(one - other) > 1e-3 for one, other in zip(alone, ours, strict=True))
    return {
        "unguided": student.family.unguided,
        "embedder": student.network.config.get("guidance_embeds", False),
        "lora": ADAPTER if own_lora and loads else None,
        "no_loader": kind if own_lora and not loads else None,
        "wrong": ", ".join(f"{level:.3g}" for level in alone) if differ else None,
    }


def check(script: Path, snapshot: Snapshot, student: Denoiser, sampling: dict[str, Any]) -> dict[str, Any]:
    """Sample the grid with the written script, compare with our sampler, save it as samples.png; what the card tells.

    Raises:
        UserError: the images differ by more than rounding.
    """
    plain = runpy.run_path(str(script))
    seeds = plain["SEEDS"]
    theirs = plain["sample"](*plain["load"](), plain["draw"](seeds))
    ours = student_sample(student, snapshot.cfg, seeds, torch.device("cpu"), sampling["labels"])
    difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(f"{snapshot.run}: the script's images differ from ours by {difference:g}; nothing was exported")
    found = {"samples": len(seeds), "difference": difference, "largest": largest, "compared": ours.numel()}
    if sampling["pixels"]:
        plain["save_grid"](theirs, script.with_name("samples.png"))
        a, b = (quantise(images, sampling["rounding"]) for images in (theirs, ours))
        found["changed"] = int((a != b).sum())
    return {**found, "torch": torch.__version__, "diffusers": diffusers.__version__}


def export(snapshot: Snapshot, out: Path, licence: str | None = None, force: bool = False) -> None:
    """Write the folder: unet/ or transformer/, scheduler/, sample.py, samples.png (of pixels without prompts), card.

    A UNet of text is there in one float16 file, too. Factors of a text student of low rank are written beside it: a
    UNet's in kohya's format, a transformer's as its pipeline loads them.

    Raises:
        UserError: see `find_snapshot`, `Snapshot.denoiser`, `check` and `atomic_folder`.
    """
    with export_folder(out, force) as folder:
        student = snapshot.denoiser()
        sampling = sampling_of(snapshot, student)
        student.network.save_pretrained(folder / sampling["part"], safe_serialization=True)
        if sampling["text"] and not sampling["flow"]:
            save_shard(folder / SINGLE, {name: value.half() for name, value in student.network.state_dict().items()})
        if sampling["lora"]:
            if sampling["flow"]:
                save_shard(folder / ADAPTER, adapter_state(snapshot.factors()))
            else:
                write_kohya(folder / LORA, snapshot.factors())
        scheduler_of(student, snapshot.cfg.generator).save_pretrained(folder / "scheduler")
        if isinstance(student.network, SongUNet):  # which diffusers lacks
            shutil.copyfile(inspect.getfile(SongUNet), folder / "song_unet.py")
        script = template(TEMPLATES / "sample.py.j2").render(sampling)
        (folder / "sample.py").write_text(script, encoding="utf-8")
        checked = check(folder / "sample.py", snapshot, student, sampling) if sampling["seeded"] else None
        model_card(snapshot, sampling, script, checked, licence).save(folder / "README.md")
