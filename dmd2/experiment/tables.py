"""Ablations as data: bases, tables and their rows become validated runs before any DAG exists."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from dmd2.core.errors import UserError
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.checks.sections import check_all
from dmd2.experiment.checks.shared import check_shared
from dmd2.experiment.config import RunConfig, Section
from dmd2.experiment.dotted_keys import Change, Written, apply_change, differences, holds, validate
from dmd2.experiment.metrics import BETTER, FRECHET
from dmd2.experiment.metrics import measured as numbers_of
from dmd2.experiment.protocols import named
from dmd2.experiment.table_rows import KINDS, Placed, Row, Rows, rows_of
from dmd2.experiment.yaml_file import YamlFile, read_yaml

BASES, TABLES = Path("workflow/base"), Path("workflow/tables")
# Suffixes of what is written beside the JSON of a table.
BESIDE = ("md", "csv", "curves.csv", "metrics.yaml")
# Their tests are in eval/report/claims.py.
ClaimName = Literal[
    "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15", "C16"
]


Seed = Annotated[int, Field(ge=0)]


def _distinct(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value} is given twice")
    return values


class Preset(Section):
    """A recipe: a change with a name, for rows of any table."""

    title: str
    change: dict[str, Any]


class Table(Section):
    """One table or figure.

    `rows` lists rows, names another table whose rows (with the paper's numbers) are taken, or does both: `{from: other
    table, add: [rows]}`. `change` applies to all of them before their preset and their own change, `row_change` to
    single ones after it; those of another table are not taken with its rows.
    """

    title: str
    base: str
    rows: Rows
    metrics: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = ["fd"]
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = [0]
    select: Annotated[str, Field(pattern="^(last|best)$")] = "last"
    columns: dict[str, str] = {}
    change: dict[str, Any] = {}
    row_change: dict[str, dict[str, Any]] = {}
    teachers: dict[str, dict[str, float | None]] = {}
    published: dict[str, dict[str, float]] = {}
    claims: list[ClaimName] = []
    reference_row: str | None = None
    notes: str = ""


@dataclass(frozen=True)
class Experiment:
    """Everything the tables ask for: tables by name, rows of each, and one config per (base, run)."""

    tables: dict[str, Table] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    runs: dict[tuple[str, str], RunConfig] = field(default_factory=dict)
    bases: dict[str, RunConfig] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)

    def config_of(self, base: str, run: str) -> RunConfig:
        """Config of a run, by its name in any table.

        Raises:
            UserError: no table has such a run.
        """
        if (base, run) not in self.runs:
            known = sorted(name for of, name in self.runs if of == base)
            near = difflib.get_close_matches(run, known, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; runs of {base}: {', '.join(known) or 'none'}"
            raise UserError(f"no table has the run {base}/{run}{hint}")
        return self.runs[base, run]

    def shown(self, table: str) -> Any:
        """All of a table that its text shows: an edited number of the paper remakes the table and nothing else."""
        rows = [row.settings() for row in self.rows[table]]
        presets = {row.preset: self.presets[row.preset].change for row in self.rows[table] if row.preset is not None}
        return [self.tables[table].settings(), rows, presets]

    def measured(self, table: str) -> list[str]:
        """Files of metrics that a table is made from."""
        spec = self.tables[table]
        runs = [RunId(spec.base, row.run, seed).folder for row in self.rows[table] for seed in spec.seeds]
        return [str(folder / "metrics.json") for folder in [*runs, *(SAMPLERS / spec.base / s for s in spec.teachers)]]

    def ticks(self, table: str, run: str) -> dict[str, bool]:
        """Column name to tick, computed from the run's config."""
        spec = self.tables[table]
        return {name: holds(cond, self.runs[spec.base, run]) for name, cond in spec.columns.items()}


def load_base(name: str, folder: Path = BASES) -> tuple[dict[str, Any], RunConfig]:
    """A base as plain values, defaults included, and validated."""
    _, cfg = _read_base(name, folder)
    return cfg.model_dump(mode="json"), cfg


def _read_base(name: str, folder: Path) -> tuple[YamlFile, RunConfig]:
    source = read_yaml(_named("base", name, folder))
    return source, validate(RunConfig, _with_protocol(source), source)


def _named(kind: str, name: str, folder: Path) -> Path:
    """The file of a base or preset; UserError with the nearest name if there is none."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(name, [p.stem for p in folder.glob("*.yaml")], n=1)
        raise UserError(f"there is no {kind} {path}" + (f", did you mean {near[0]}?" if near else ""))
    return path


def _with_protocol(source: YamlFile) -> Any:
    """Values of a base, with those of the protocol that it names where it gives none."""
    measured = source.value.get("eval") if isinstance(source.value, dict) else None
    if not isinstance(measured, dict) or not isinstance(measured.get("protocol"), str):
        return source.value
    try:
        return {**source.value, "eval": {**named(measured["protocol"]).for_a_base(), **measured}}
    except UserError as error:
        raise UserError(f"{source.where('eval', 'protocol')}: eval.protocol: {error}") from None


def load_experiment(tables: Path = TABLES, bases: Path = BASES) -> Experiment:
    """Read every table, merge each row over its base and validate it; presets lie beside the folder of bases.

    Raises:
        UserError: one sentence with file, line and key for the first problem found.
    """
    experiment = Experiment()
    sources = {path.stem: read_yaml(path) for path in sorted(tables.glob("*.yaml"))}
    experiment.tables.update({name: _table(source) for name, source in sources.items()})
    specs = {name: table.rows for name, table in experiment.tables.items()}
    written: list[Written] = []  # bases before the rows over them
    for name, table in experiment.tables.items():
        placed = rows_of(name, specs, sources)
        experiment.rows[name] = [found.row for found in placed]
        if table.base not in experiment.bases:
            source, experiment.bases[table.base] = _read_base(table.base, bases)
            written.append(Written(experiment.bases[table.base], source))
        base = next(found.base for found in written if found.cfg is experiment.bases[table.base])
        written += [_run(experiment, name, found, sources[name], base, bases) for found in placed]
        _check_references(experiment, name, sources[name])
    check_shared(written)
    check_all(written)
    _check_origins(experiment)
    return experiment


def _table(source: YamlFile) -> Table:
    try:
        return Table.model_validate(source.value)
    except ValidationError as error:
        errors = error.errors()  # a misspelled key also makes the right one "missing": the misspelling is the news
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        given = tuple(key for key in first["loc"] if key not in KINDS)
        loc = tuple("from" if key == "origin" else key for key in given)
        if first["type"] == "extra_forbidden":
            known = _known_beside(loc)
            near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"{source.where(*loc)}: no key {loc[-1]}{hint}") from None
        keys = ".".join(str(key) for key in loc)
        if first["type"] == "missing":
            raise UserError(f"{source.where(*loc)}: key {keys} is missing") from None
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        raise UserError(f"{source.where(*loc)}: {keys}: {first['msg'].removeprefix('Value error, ')}{got}") from None


def _known_beside(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand where a table has an unknown one."""
    if loc[0] != "rows":
        return list(Table.model_fields)
    return list(Row.model_fields) if isinstance(loc[-2], int) else ["from", "add"]


def _run(
    experiment: Experiment, name: str, placed: Placed, table_source: YamlFile, base: YamlFile, bases: Path
) -> Written:
    """The config of a row of the table `name`, which the experiment then knows."""
    table, row, values = experiment.tables[name], placed.row, experiment.bases[experiment.tables[name].base]
    changes = [
        Change(table.change, table_source, ("change",)),
        *_preset(experiment, row, placed.where("preset"), bases.with_name("presets")),
        Change(row.change, placed.source, (*placed.keys, "change")),
        Change(table.row_change.get(row.run, {}), table_source, ("row_change", row.run)),
    ]
    try:
        changed = apply_change(values.model_dump(mode="json"), *(change.values for change in changes))
    except KeyError as error:
        key = error.args[0].removeprefix("no key ").split(",")[0]
        where = next(change.where(key) for change in changes if key in change.values)
        raise UserError(f"{where}: row {row.run}: {error.args[0]}") from None
    place = placed.where()
    if changed["eval"]["protocol"] != values.eval.protocol:
        raise UserError(f"{place}: row {row.run}: eval.protocol belongs to the base: the rows of a table share one")
    cfg = validate(RunConfig, changed, placed.source, *placed.keys, "change", changes=changes)
    earlier = experiment.runs.setdefault((table.base, row.run), cfg)
    if earlier != cfg:
        same_base = [t for t in experiment.rows if t != name and experiment.tables[t].base == table.base]
        other = next(t for t in same_base if row.run in [r.run for r in experiment.rows[t]])
        keys = "; ".join(f"{key}: {there} there, {here} here" for key, there, here in differences(earlier, cfg))
        raise UserError(f"{place}: row {row.run} contradicts the row of that name in table {other} ({keys})")
    return Written(cfg, base, f"row {row.run}: ", changes)


def _preset(experiment: Experiment, row: Row, place: str, folder: Path) -> list[Change]:
    """The change of the row's preset, which the experiment then knows; none without one."""
    if row.preset is None:
        return []
    try:
        source = read_yaml(_named("preset", row.preset, folder))
    except UserError as error:
        raise UserError(f"{place}: row {row.run}: {error}") from None
    experiment.presets[row.preset] = preset = validate(Preset, source.value, source)
    return [Change(preset.change, source, ("change",))]


def _check_origins(experiment: Experiment) -> None:
    """Every `train.init_from` names a row, and none leads back to where it started."""
    for (base, run), cfg in experiment.runs.items():
        seen = [run]
        while (origin := cfg.train.init_from) is not None:
            if (base, origin) not in experiment.runs:
                raise UserError(f"{base}/{seen[-1]}: train.init_from names {origin}, which no table has as a row")
            if origin in seen:
                chain = " from ".join([*seen, origin])
                raise UserError(f"{base}/{run}: train.init_from leads in a circle: {chain}")
            seen.append(origin)
            cfg = experiment.runs[base, origin]


def _check_references(experiment: Experiment, name: str, source: YamlFile) -> None:
    table, runs = experiment.tables[name], {row.run for row in experiment.rows[name]}
    for column, condition in table.columns.items():
        try:
            holds(condition, experiment.bases[table.base])
        except ValueError as error:
            raise UserError(f"{source.where('columns', column)}: {error}") from None
    if table.reference_row is not None and table.reference_row not in runs:
        raise UserError(f"{source.where('reference_row')}: reference_row {table.reference_row} is no row of the table")
    measured = experiment.bases[table.base].eval
    known = numbers_of(measured.metrics)
    for i, metric in enumerate(table.metrics):
        if metric not in known:
            where = source.where("metrics", i)
            raise UserError(f"{where}: base {table.base} does not measure {metric}, only {', '.join(known)}")
    _check_directions(table, source)
    for teacher in table.teachers:
        if teacher not in measured.teacher_samplers:
            raise UserError(f"{source.where('teachers', teacher)}: base {table.base} has no sampler {teacher}")
    for run in table.row_change:
        if run not in runs:
            raise UserError(f"{source.where('row_change', run)}: row_change names {run}, which is no row of the table")


def _check_directions(table: Table, source: YamlFile) -> None:
    """Refuse the best by a metric of which neither direction is better, and claims without what they are about."""
    first = table.metrics[0]
    if table.select == "best" and first not in BETTER:
        raise UserError(
            f"{source.where('select')}: select: best goes by the first of metrics, and neither the lowest nor the "
            f"highest {first} is the best: name another first, or select: last"
        )
    about = [claim for claim in table.claims if claim != "C2"]  # that one is about brightness over training
    if about and not set(FRECHET) & set(table.metrics):
        raise UserError(
            f"{source.where('claims')}: claims: {about[0]} is about the paper's FID, and metrics "
            f"({', '.join(table.metrics)}) has no {' or '.join(FRECHET)}: add one, or leave the claim out"
        )
