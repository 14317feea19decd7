"""What a training reads, the identity that follows from it, and whether it is finished; imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.config import TrainConfig, digest
from dmd2.files import content_of, digest_of, read_json
from dmd2.run import RunId

REAL, TEACHERS, PAIRS = Path("data/real"), Path("data/teachers"), Path("data/pairs")


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
        paths = {"teacher": self.teacher, "real": self.real, "pairs": self.pairs, "init": self.init}
        return {name: None if path is None else content_of(path) for name, path in paths.items()}

    def key(self, cfg: TrainConfig, seed: int) -> str:
        """Names the checkpoints of a training: a function of all that can change its weights."""
        return digest_of({"config": digest(cfg), "inputs": self.identity(), "seed": seed})


def finished(run: RunId, cfg: TrainConfig, key: str) -> dict[str, Any] | None:
    """Record of the completed training of exactly this config on exactly these inputs (`key`), if there is one.

    The job writes it as finished.json. Snakemake knows train.json, which it deletes whenever it reruns the rule; this
    file survives that, so a training that ended while nobody waited is not started again.
    """
    path = run.folder / "finished.json"
    if not path.exists():
        return None
    record = read_json(path)
    same = record["key"] == key and record["config"] == cfg.model_dump(mode="json")
    there = all((run.folder / f["path"]).exists() for f in record["files"])
    return record if same and there else None
