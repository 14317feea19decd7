"""What several runs share by its name (sets, teachers, pipelines, statistics): one name, one definition."""

from collections.abc import Iterable, Iterator
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.config import RunConfig
from dmd2.experiment.dotted_keys import Written, differences
from dmd2.experiment.run_inputs import pipeline_settings

Definition = tuple[str, str, str, dict[str, Any]]  # what, its name, the key of its name, and what it is by dotted keys


def definitions(cfg: RunConfig) -> Iterator[Definition]:
    """All that a config defines by name; what is not in a definition may differ between the runs that share it."""
    data = cfg.data.model_dump(mode="json")
    yield "data", cfg.data.name, "data.name", {"data": data}
    if (text := cfg.data.text) is not None:
        settings = pipeline_settings(cfg.data)
        made = {"text": {"pipeline": text.pipeline.model_dump(mode="json"), "latents": settings["latents"]}}
        images = {key: data[key] for key in ("source", "resolution") if key in settings}
        yield "pipeline", text.pipeline.name, "data.text.pipeline.name", {"data": {**made, **images}}
    teacher = cfg.teacher.model_dump(mode="json", exclude={"guidance"})  # which is the run's
    trained = {"data": data} if cfg.teacher.train is not None else {}  # what another one learned from is not known here
    yield "teacher", cfg.teacher.name, "teacher.name", {"teacher": teacher, **trained}
    spec = cfg.eval
    measured = {"detector": spec.detector, "reference": spec.reference, "geometry": spec.geometry}
    yield "reference", spec.statistics, "eval.reference", {"eval": measured}
    if spec.patch is not None and spec.patch_statistics is not None:
        measured = {"detector": spec.detector, "reference": spec.patch.reference, "geometry": spec.patch.geometry}
        yield "reference", spec.patch_statistics, "eval.patch.reference", {"eval": measured}


def check_shared(written: Iterable[Written]) -> None:
    """Refuse two definitions of one name: made after the second, an artefact would replace that of the first.

    Raises:
        UserError: with both places, the first difference, and what to rename.
    """
    known: dict[tuple[str, str], tuple[dict[str, Any], Written]] = {}
    for one in written:
        for what, name, key, definition in definitions(one.cfg):
            first, other = known.setdefault((what, name), (definition, one))
            if first == definition:
                continue
            (differs, there, here), *_ = differences(first, definition)
            raise UserError(
                f"{one.where(differs)}: {one.row}{what} {name} is defined as another one at {other.where(differs)} "
                f"({differs}: {there} there, {here} here): give one of them another {key}"
            )
