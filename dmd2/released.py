"""A student that its authors published: its weights become a run that was never trained here."""

from pathlib import Path

from dmd2.config import TrainConfig
from dmd2.convert import student_state
from dmd2.data import save_shard
from dmd2.errors import UserError
from dmd2.files import digest_of, listing, sha256, write_json
from dmd2.made import made_from, signed
from dmd2.run import RunId, commit
from dmd2.teachers import build_network


def publish_released(run: RunId, cfg: TrainConfig) -> Path:
    """Write the run's train.json and its one snapshot from the file that ``train.released`` names.

    The snapshot's number and the count of student updates are those of the authors' training, as ``train.steps`` and
    ``critic.ratio`` tell them; seconds and cost are unknown.

    Raises:
        UserError: the file is missing, or its weights are not those of a student with the teacher's architecture.
    """
    assert cfg.train.released is not None and cfg.teacher.network is not None
    source = Path(cfg.train.released)
    if not source.exists():
        raise UserError(f"{run}: train.released: {source} is not there: download it and put it in this place")
    checksum = sha256(source)
    key = digest_of(checksum)
    snapshot = run.folder / f"snapshots-{key}" / f"{cfg.train.steps:07d}.safetensors"
    save_shard(snapshot, student_state(source, build_network(cfg.teacher.network, seed=0)))
    record = {
        "kind": "run", "run": str(run), "key": key,
        "steps": cfg.train.steps, "student_updates": -(-cfg.train.steps // cfg.critic.ratio), "seconds": None,
        "device": "released", "commit": "released", "cost": {}, "released": {"path": str(source), "sha256": checksum},
        "imported_at": commit(), "config": cfg.model_dump(mode="json"), "last": {},
        "files": listing([snapshot], run.folder),
    }  # fmt: skip
    write_json(run.folder / "train.json", signed(record, made_from(cfg.settings(), [])))
    return run.folder / "train.json"
