"""One snapshot of a finished run: how it is chosen, its network, and its measurements."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmd2.convert.unets import empty_unet
from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified
from dmd2.core.run import RunId
from dmd2.data.sets import load_shard
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.metrics import BETTER, best_first, measured
from dmd2.experiment.run_inputs import TEACHERS
from dmd2.networks.denoisers import Denoiser, Network
from dmd2.networks.lora import State, split
from dmd2.training.teachers import network_class, unet_folder, wrap


@dataclass(frozen=True)
class Snapshot:
    """Weights of a run after `step` iterations; `metrics` is the run's metrics.json if it is of this training."""

    run: RunId
    cfg: TrainConfig
    record: dict[str, Any]
    entry: dict[str, Any]
    metrics: dict[str, Any] | None
    selection: str

    @property
    def step(self) -> int:
        """Critic updates done."""
        return step_of(self.entry)

    @property
    def measured(self) -> dict[str, Any] | None:
        """The snapshot's line of metrics.json."""
        lines = self.metrics["snapshots"] if self.metrics else []
        return next((line for line in lines if line["step"] == self.step), None)

    def denoiser(self) -> Denoiser:
        """The student with these weights on the CPU, in eval mode, after comparing their checksum.

        Raises:
            UserError: the weights are missing or damaged, or do not fit the network of the teacher's config.json.
        """
        name = self.cfg.teacher.name
        weights, _ = split(load_shard(verified(self.run.folder, self.entry)))
        network = network_of(TEACHERS / name / "manifest.json")
        try:
            network.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"{self.run.folder / self.entry['path']} does not fit the network in {TEACHERS / name}: put "
                f"back the teacher this run was trained with ({str(error).splitlines()[-1].strip()})"
            ) from None
        teacher = self.cfg.teacher
        return wrap(network, teacher.parameterisation, **teacher.flow).eval().requires_grad_(False)

    def factors(self) -> State:
        """The low-rank factors merged into the weights (see `dmd2.networks.lora`), empty if all of them were trained.

        Raises:
            UserError: the weights are missing or damaged.
        """
        return split(load_shard(verified(self.run.folder, self.entry)))[1]


def network_of(manifest: Path) -> Network:
    """The network that a teacher's manifest describes; a text-to-image UNet without memory for its weights.

    Raises:
        UserError: the manifest or the config.json that it lists is missing, or the latter was changed.
    """
    if not manifest.exists():
        name = manifest.parent.name
        raise UserError(f"{manifest} is missing: put the folder of teacher {name} there, it describes the network")
    teacher = read_json(manifest)
    path = f"{teacher['folder']}/config.json"
    config = verified(manifest.parent, next(file for file in teacher["files"] if file["path"] == path))
    if teacher["class"] == "UNet2DConditionModel":
        return empty_unet(config.parent)
    return network_class(teacher["class"]).from_config(read_json(config))


def step_of(entry: dict[str, Any]) -> int:
    """Step of a snapshot's manifest entry."""
    return int(Path(entry["path"]).stem)


def find_snapshot(run: RunId, step: int | None = None, select: str | None = None) -> Snapshot:
    """The snapshot of that step, or the ``last`` (the default) or ``best`` one of a finished run.

    Raises:
        UserError: the run is not finished, has no such snapshot, or was not measured and ``best`` is asked for.
    """
    path = run.folder / "train.json"
    if not path.exists():
        raise UserError(f"{run} is not finished, {path} is missing: dmd2 run {run}")
    if step is not None and select is not None:
        raise UserError("give either --step or --select, not both")
    record = read_json(path)
    if source := record.get("released", {}).get("path"):
        config = record["config"]
        command = f"dmd2 convert {source} FOLDER"
        if config["data"].get("text"):
            command += f" --base {unet_folder(TEACHERS / config['teacher']['name'] / 'manifest.json')}"
        raise UserError(f"{run} is its authors'; a diffusers folder of it: {command}")
    try:
        cfg = TrainConfig.model_validate(record["config"])
    except ValidationError as error:
        raise UserError(
            f"{path} holds a config of another version of this code ({error.errors()[0]['msg']}): export it there"
        ) from None
    metrics = _metrics(run, record)
    entries = {step_of(entry): entry for entry in record["files"]}
    if step is None:
        step, selection = _best(run, metrics) if select == "best" else (max(entries), "the last snapshot")
    else:
        selection = "a snapshot chosen by hand"
    if step not in entries:
        raise UserError(f"{run} has no snapshot of step {step}; it has {', '.join(map(str, sorted(entries)))}")
    return Snapshot(run, cfg, record, entries[step], metrics, selection)


def _metrics(run: RunId, record: dict[str, Any]) -> dict[str, Any] | None:
    """The run's metrics.json unless it is missing or measures an earlier training of that name."""
    path = run.folder / "metrics.json"
    metrics = read_json(path) if path.exists() else None
    return metrics if metrics and metrics.get("key") == record["key"] else None


def _best(run: RunId, metrics: dict[str, Any] | None) -> tuple[int, str]:
    if metrics is None:
        raise UserError(f"{run} has no metrics.json of this training, so none of its snapshots is known to be the best")
    metric, lines = measured(metrics["config"]["eval"]["metrics"])[0], metrics["snapshots"]
    if metric not in BETTER:
        raise UserError(
            f"{run.folder / 'metrics.json'}: eval.metrics begins with {metric}, of which neither the lowest nor the "
            "highest is the best: choose with --step"
        )
    end = "lowest" if BETTER[metric] == "lower" else "highest"
    text = f"the snapshot with the {end} {metric} of {len(lines)}, chosen on the same images, so its {metric} flatters"
    return min(lines, key=lambda line: best_first(metric, line[metric]))["step"], text
