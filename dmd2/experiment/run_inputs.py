"""What a training reads, and the identity that follows from it; imports no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmd2.core.files import content_of, digest_of
from dmd2.core.provenance import made_from
from dmd2.core.retraining import current_key
from dmd2.core.run import Goal, RunId
from dmd2.experiment.config import Data, RunConfig, TrainConfig, digest

REAL, TEACHERS, PAIRS = Path("data/real"), Path("data/teachers"), Path("data/pairs")
WEIGHTS, REFS = Path("data/weights"), Path("data/refs")
FEATURES = Path("data/features")  # cache of all feature shards of evaluations
PIPELINES, PROMPTS = Path("data/pipelines"), Path("data/prompts")


def _manifest(folder: Path, name: str | None) -> Path | None:
    """Manifest of the artefact `name`; None without a name."""
    return folder / name / "manifest.json" if name else None


def pipeline_manifest(data: Data) -> Path | None:
    """Manifest of the pipeline that encodes a set's prompts, None where there is no text."""
    return None if data.text is None else _manifest(PIPELINES, data.text.pipeline.name)


def pipeline_settings(data: Data) -> dict[str, Any]:
    """What a pipeline depends on: itself, and the images on which its autoencoder is trained, if it is made here."""
    assert data.text is not None
    settings: dict[str, Any] = {"pipeline": data.text.pipeline.settings(), "latents": data.text.latents}
    if data.text.pipeline.autoencoder is not None:
        settings |= {"source": data.source.settings(), "resolution": data.resolution}
    return settings


def prompt_settings(data: Data) -> dict[str, Any]:
    """What encoded prompts depend on besides their file: the pipeline, and the image size that SDXL is told."""
    return {"pipeline": pipeline_settings(data), "resolution": data.resolution}


def prompt_set(data: Data, source: str) -> str:
    """Name of the encoded prompts of the file `source`: the same file is encoded once for all bases that agree."""
    assert data.text is not None
    return f"{data.text.pipeline.name}-{Path(source).stem}-{digest_of([source, prompt_settings(data)])}"


def _prompts_or_captions(data: Data, source: str | None) -> Path | None:
    """Manifest of the encoded prompts of the file `source`, or of the real set with its captions; None for labels."""
    if data.text is None:
        return None
    return _manifest(PROMPTS, prompt_set(data, source)) if source else _manifest(REAL, data.name)


def pair_prompts(data: Data) -> Path | None:
    """Manifest of the prompts that teacher pairs are drawn for, None where they are labels."""
    return None if data.text is None else _prompts_or_captions(data, data.text.prompts)


def pair_inputs(data: Data) -> list[Path]:
    """Manifests that pairs are made from besides the teacher's."""
    return [path for path in (pipeline_manifest(data), pair_prompts(data)) if path is not None]


def eval_prompts(cfg: RunConfig) -> Path | None:
    """Manifest of the prompts of an evaluation, None for classes; by default the real set, whose captions they are."""
    return _prompts_or_captions(cfg.data, cfg.eval.prompts)


def _teacher(cfg: TrainConfig) -> Path | None:
    """Manifest of the teacher, None for a released student of classes, which needs none."""
    return None if cfg.released_whole else _manifest(TEACHERS, cfg.teacher.name)


OF_EVERY_RUN = ("teacher", "real", "pairs", "init")


@dataclass(frozen=True)
class Inputs:
    """Manifests a training reads; their content is part of the identity of its checkpoints."""

    teacher: Path | None
    real: Path | None
    pairs: Path | None
    init: Path | None
    pipeline: Path | None = None
    prompts: Path | None = None

    @staticmethod
    def of(run: RunId, cfg: TrainConfig) -> "Inputs":
        """The conventional places for `cfg`."""
        origin = cfg.train.init_from
        return Inputs(
            teacher=_teacher(cfg),
            real=_manifest(REAL, cfg.data.name) if cfg.needs_real else None,
            pairs=_manifest(PAIRS, cfg.pair_set) if cfg.needs_pairs else None,
            init=RunId(run.base, origin, run.seed).folder / "train.json" if origin else None,
            pipeline=pipeline_manifest(cfg.data),
            prompts=_prompts_or_captions(cfg.data, cfg.prompts) if cfg.prompts else None,
        )

    def identity(self) -> dict[str, str | None]:
        """Content hash of every input; one of a later version counts only where it is used."""
        found = {name: None if path is None else content_of(path) for name, path in asdict(self).items()}
        return {name: value for name, value in found.items() if value is not None or name in OF_EVERY_RUN}

    def paths(self) -> list[Path]:
        """Those that there are."""
        return [path for path in asdict(self).values() if path is not None]

    def key(self, cfg: TrainConfig, seed: int) -> str:
        """Names the checkpoints of a training: a function of all that can change its weights but the code."""
        return digest_of({"config": digest(cfg), "inputs": self.identity(), "seed": seed})


def goal_of(run: RunId, cfg: TrainConfig) -> Goal:
    """The training of a run with its inputs in their usual places.

    Raises:
        UserError: an input is missing.
    """
    inputs = Inputs.of(run, cfg)
    return Goal(run, current_key(run, inputs.key(cfg, run.seed)), made_from(cfg.settings(), inputs.paths()))


def measured_with(cfg: RunConfig) -> dict[str, Path]:
    """Manifests that an evaluation reads besides what it evaluates."""
    found = {
        "teacher": _teacher(cfg),
        "detector": _manifest(WEIGHTS, cfg.eval.detector),
        "reference": _manifest(REFS, cfg.eval.statistics),
        "pipeline": pipeline_manifest(cfg.data),
        "prompts": eval_prompts(cfg),
        "patch_reference": _manifest(REFS, cfg.eval.patch_statistics),
        "clip": _manifest(WEIGHTS, cfg.eval.clip),
    }
    return {name: path for name, path in found.items() if path is not None}
