"""What a training reads, and the identity that follows from it; imports no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path

from dmd2.config import RunConfig, TrainConfig, digest
from dmd2.files import content_of, digest_of
from dmd2.made import made_from
from dmd2.run import Goal, RunId

REAL, TEACHERS, PAIRS = Path("data/real"), Path("data/teachers"), Path("data/pairs")
WEIGHTS, REFS = Path("data/weights"), Path("data/refs")


@dataclass(frozen=True)
class Inputs:
    """Manifests a training reads; their content is part of the identity of its checkpoints."""

    teacher: Path
    real: Path | None
    pairs: Path | None
    init: Path | None

    @staticmethod
    def of(run: RunId, cfg: TrainConfig) -> "Inputs":
        """The conventional places for `cfg`."""
        init = cfg.train.init_from and RunId(run.base, cfg.train.init_from, run.seed).folder / "train.json"
        return Inputs(
            TEACHERS / cfg.teacher.name / "manifest.json",
            REAL / cfg.data.name / "manifest.json" if cfg.needs_real else None,
            PAIRS / cfg.pair_set / "manifest.json" if cfg.needs_pairs else None,
            Path(init) if init else None,
        )

    def identity(self) -> dict[str, str | None]:
        """Content hash of every input."""
        return {name: None if path is None else content_of(path) for name, path in asdict(self).items()}

    def paths(self) -> list[Path]:
        """Those that there are."""
        return [path for path in asdict(self).values() if path is not None]

    def key(self, cfg: TrainConfig, seed: int) -> str:
        """Names the checkpoints of a training: a function of all that can change its weights."""
        return digest_of({"config": digest(cfg), "inputs": self.identity(), "seed": seed})


def goal_of(run: RunId, cfg: TrainConfig) -> Goal:
    """The training of a run with its inputs in their usual places.

    Raises:
        UserError: an input is missing.
    """
    inputs = Inputs.of(run, cfg)
    return Goal(run, inputs.key(cfg, run.seed), made_from(cfg.settings(), inputs.paths()))


def measured_with(cfg: RunConfig) -> dict[str, Path]:
    """Manifests that an evaluation reads besides what it evaluates; a released student does without its teacher."""
    teacher = {} if cfg.train.released else {"teacher": TEACHERS / cfg.teacher.name / "manifest.json"}
    return {
        **teacher,
        "detector": WEIGHTS / cfg.eval.detector / "manifest.json",
        "reference": REFS / cfg.eval.statistics / "manifest.json",
    }
