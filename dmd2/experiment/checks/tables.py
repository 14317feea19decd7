"""Whether a table asks for what its base measures, and whether the runs of all tables agree; imports no torch."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from dmd2.core.errors import UserError, did_you_mean
from dmd2.experiment.config import RunConfig
from dmd2.experiment.dotted_keys import LocatedConfig, differences, holds
from dmd2.experiment.metrics import BETTER, FRECHET, measured
from dmd2.experiment.run_inputs import pipeline_settings
from dmd2.experiment.table_config import ClaimName, ClaimTest, Table
from dmd2.experiment.teacher_config import OF_RUN
from dmd2.experiment.yaml_file import Place

Definition = tuple[str, str, str, dict[str, Any]]  # what, its name, the key of its name, and what it is by dotted keys
Known = dict[tuple[str, str], tuple[dict[str, Any], LocatedConfig]]  # definitions and their places, by what and name


def check_table(table: Table, rows: set[str], base: RunConfig, place: Place) -> None:
    """Refuse a table that names what its rows or its base do not have.

    Raises:
        UserError: one sentence with file, line and key for the first problem.
    """
    for *keys, told in _problems(table, rows, base):
        raise UserError(f"{place.where(*keys)}: {told}")


def _problems(table: Table, rows: set[str], base: RunConfig) -> Iterator[tuple[str, ...]]:
    """Keys of the table, and what is wrong there."""
    for column, condition in table.columns.items():
        try:
            holds(condition, base)
        except ValueError as error:
            yield "columns", column, str(error)
    if table.reference_row is not None and table.reference_row not in rows:
        yield "reference_row", f"reference_row {table.reference_row} is no row of the table"
    known, shown = measured(base.eval.metrics), ", ".join(table.metrics)
    for i, metric in enumerate(table.metrics):
        if metric not in known:
            yield "metrics", str(i), f"base {table.base} does not measure {metric}, only {', '.join(known)}"
    first = table.metrics[0]
    if table.select == "best" and first not in BETTER:
        told = f"neither the lowest nor the highest {first} is the best: name another first, or select: last"
        yield "select", f"select: best goes by the first of metrics, and {told}"
    # C2 is about brightness over training.
    about = [claim for claim in table.claims if isinstance(claim, str) and claim != "C2"]
    if about and not set(FRECHET) & set(table.metrics):
        told = f"metrics ({shown}) has no {' or '.join(FRECHET)}: add one, or leave the claim out"
        yield "claims", f"claims: {about[0]} is about the paper's FID, and {told}"
    for teacher in table.teachers.keys() - base.eval.teacher_samplers.keys():
        yield "teachers", teacher, f"base {table.base} has no sampler {teacher}"
    for run in table.row_change.keys() - rows:
        yield "row_change", run, f"row_change names {run}, which is no row of the table"
    yield from _claim_problems(table, rows)


def _claim_problems(table: Table, rows: set[str]) -> Iterator[tuple[str, ...]]:
    """Of the table's own claims; rows of the paper's may be missing, which their verdicts say."""
    seen = set(get_args(ClaimName))
    for i, claim in enumerate(table.claims):
        if isinstance(claim, str):
            continue
        if claim.id in seen:
            told = f"claims: {claim.id} is the name of another claim, of this table or of the paper: choose another id"
            yield "claims", str(i), "id", told
        seen.add(claim.id)
        for j, test in enumerate(claim.tests):
            at = ("claims", str(i), *(("also", str(j - 1)) if j else ()))
            for key, told in _test_problems(table, test, rows):
                yield *at, key, f"claims: {claim.id}: {told}"


def _test_problems(table: Table, test: ClaimTest, rows: set[str]) -> Iterator[tuple[str, str]]:
    """Keys of a test of a claim, and what is wrong there."""
    distance = next((metric for metric in table.metrics if metric in FRECHET), None)
    of_distance = ["distance", *(["patch"] if f"patch_{distance}" in table.metrics else [])] if distance else []
    metrics = dict.fromkeys([*table.metrics, *of_distance, "brightness_std"])
    if test.metric not in metrics:
        yield "metric", f"{test.metric} is no metric of the table, which has {', '.join(metrics)}"
    teachers = ["teacher", *(f"teacher-{name}" for name in table.teachers)] if table.teachers else []
    named = [*sorted(rows), *teachers, *(["published best"] if table.published else [])]
    for key, run in (("a", test.a), ("b", test.b)):
        if run not in named:
            hint = did_you_mean(run, named, f", which has {', '.join(named)}")
            yield key, f"{run} is no row of the table{hint}"
        elif test.rule == "faster" and (run not in rows or test.metric == "brightness_std"):
            yield key, f"rule faster compares trainings at equal time, and {test.metric} of {run} has no curve over it"
    if test.a == test.b:
        yield "b", f"a and b are both {test.a}: a claim compares two rows"


def check_origins(base: str, rows: Iterable[str], runs: Mapping[tuple[str, str], RunConfig]) -> None:
    """Refuse a `train.init_from` that names no row, or leads back to where it started, given all runs by (base, row).

    Raises:
        UserError: with the chain of rows.
    """
    for run in rows:
        cfg, seen = runs[base, run], [run]
        while (origin := cfg.train.init_from) is not None:
            if (base, origin) not in runs:
                raise UserError(f"{base}/{seen[-1]}: train.init_from names {origin}, which no table has as a row")
            if origin in seen:
                chain = " from ".join([*seen, origin])
                raise UserError(f"{base}/{run}: train.init_from leads in a circle: {chain}")
            seen.append(origin)
            cfg = runs[base, origin]


def definitions(cfg: RunConfig) -> Iterator[Definition]:
    """All that a config defines by a name that several runs share: sets, teachers, pipelines, statistics.

    What is not in a definition may differ between the runs that share it.
    """
    data = cfg.data.model_dump(mode="json")
    yield "data", cfg.data.name, "data.name", {"data": data}
    if (text := cfg.data.text) is not None:
        settings = pipeline_settings(cfg.data)
        made = {"text": {"pipeline": text.pipeline.model_dump(mode="json"), "latents": settings["latents"]}}
        images = {key: data[key] for key in ("source", "resolution") if key in settings}
        yield "pipeline", text.pipeline.name, "data.text.pipeline.name", {"data": {**made, **images}}
    teacher = cfg.teacher.model_dump(mode="json", exclude=OF_RUN - ({"guidance_embed"} if cfg.teacher.train else set()))
    trained = {"data": data} if cfg.teacher.train is not None else {}  # what another one learned from is not known here
    yield "teacher", cfg.teacher.name, "teacher.name", {"teacher": teacher, **trained}
    spec, patch = cfg.eval, cfg.eval.patch
    for section, name, key in ((spec, spec.statistics, "eval"), (patch, spec.patch_statistics, "eval.patch")):
        if section is not None and name is not None:
            measured_by = {"detector": spec.detector, "reference": section.reference, "geometry": section.geometry}
            yield "reference", name, f"{key}.reference", {"eval": measured_by}


def check_shared(located: Iterable[LocatedConfig], known: Known) -> None:
    """Refuse two definitions of one name: made after the second, an artefact would replace that of the first.

    The definitions are added to those that are `known`.

    Raises:
        UserError: with both places, the first difference, and what to rename.
    """
    for one in located:
        for what, name, key, definition in definitions(one.cfg):
            first, other = known.setdefault((what, name), (definition, one))
            if first != definition:
                (differs, there, here), *_ = differences(first, definition)
                raise UserError(
                    f"{one.where(differs)}: {one.row}{what} {name} is defined as another one at {other.where(differs)} "
                    f"({differs}: {there} there, {here} here): give one of them another {key}"
                )
