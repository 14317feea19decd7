"""Students that their authors published: their weights become the snapshot of a run that was never trained here."""

from pathlib import Path

from dmd2.convert.unets import empty_unet, student_state
from dmd2.core.errors import UserError
from dmd2.core.files import content_of, digest_of, listing, sha256, write_json
from dmd2.core.provenance import made_from, signed
from dmd2.core.run import RunId, commit
from dmd2.data.sets import save_shard
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import TEACHERS, Inputs
from dmd2.training.teachers import build_network, unet_folder


def publish_released(run: RunId, cfg: TrainConfig) -> Path:
    """Write the run's train.json and its one snapshot from the file that ``train.released`` names.

    The snapshot's number and the count of student updates are those of the authors' training: ``train.steps`` and
    ``critic.ratio`` give them. Seconds and cost are unknown. A text-to-image student has the teacher's network; a
    published LoRA is merged onto the teacher's weights.

    Raises:
        UserError: the file or the teacher is missing, or the weights are not those of a student of its architecture.
    """
    assert cfg.train.released is not None
    source = Path(cfg.train.released)
    if not source.exists():
        raise UserError(f"{run}: train.released: {source} is not there: download it and put it in this place")
    checksum = sha256(source)
    inputs = [] if cfg.data.text is None else Inputs.of(run, cfg).paths()
    if cfg.data.text is None:
        assert cfg.teacher.network is not None
        state, key = student_state(source, build_network(cfg.teacher.network, seed=0)), digest_of(checksum)
    else:
        teacher = TEACHERS / cfg.teacher.name / "manifest.json"
        unet = unet_folder(teacher)
        state, key = student_state(source, empty_unet(unet), unet), digest_of([checksum, content_of(teacher)])
    snapshot = run.folder / f"snapshots-{key}" / f"{cfg.train.steps:07d}.safetensors"
    save_shard(snapshot, state)
    record = {
        "kind": "run",
        "run": str(run),
        "key": key,
        "steps": cfg.train.steps,
        "student_updates": cfg.critic.student_updates(cfg.train.steps),
        "seconds": None,
        "device": "released",
        "commit": "released",
        "cost": {},
        "released": {"path": str(source), "sha256": checksum},
        "imported_at": commit(),
        "config": cfg.model_dump(mode="json"),
        "last": {},
        "files": listing([snapshot], run.folder),
    }
    write_json(run.folder / "train.json", signed(record, made_from(cfg.settings(), inputs, [str(source)])))
    return run.folder / "train.json"
