"""Ablations as data: bases, tables and their rows become validated runs before any DAG exists."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dmd2.changes import Change, apply_change, holds, validate
from dmd2.config import RunConfig, Section
from dmd2.errors import UserError
from dmd2.run import SAMPLERS, RunId
from dmd2.yaml_file import YamlFile, read_yaml
from eval.metrics import BETTER, FRECHET
from eval.metrics import measured as numbers_of
from eval.protocols import named

BASES, TABLES = Path("workflow/base"), Path("workflow/tables")
# Suffixes of what is written beside the JSON of a table.
BESIDE = ("md", "csv", "curves.csv", "metrics.yaml")
# Their tests are in eval/claims.py.
ClaimName = Literal[
    "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15", "C16"
]
NAME = r"^[a-z0-9][a-z0-9-]*$"


class Row(Section):
    """One run of a table: its name, the change against the base, and what the paper reports for it.

    `preset` names a file in workflow/presets whose change is applied before the row's own.
    """

    run: Annotated[str, Field(pattern=NAME)]
    preset: str | None = None
    change: dict[str, Any] = {}
    paper: dict[str, float | None] = {}


class Preset(Section):
    """A recipe: a change with a name, for rows of any table."""

    title: str
    change: dict[str, Any]


class Table(Section):
    """One table or figure.

    `rows` lists rows or names another table whose rows (with the paper's numbers) are taken; `change` applies to all
    of them before their preset and their own change, `row_change` to single ones after it.
    """

    title: str
    base: str
    rows: list[Row] | str
    metrics: Annotated[list[str], Field(min_length=1)] = ["fd"]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
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
    source = read_yaml(_named("base", name, folder))
    cfg = validate(RunConfig, _with_protocol(source), source)
    return cfg.model_dump(mode="json"), cfg


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
    sources: dict[str, YamlFile] = {}
    for path in sorted(tables.glob("*.yaml")):
        sources[path.stem] = read_yaml(path)
        experiment.tables[path.stem] = _table(sources[path.stem])
    for name, table in experiment.tables.items():
        owner = _owner(name, experiment.tables, sources)
        rows = experiment.tables[owner].rows
        assert not isinstance(rows, str)
        experiment.rows[name] = rows
        _add_runs(experiment, name, table, owner, sources, bases)
        _check_references(experiment, name, sources[name])
    for (base, run), cfg in experiment.runs.items():
        if cfg.train.init_from is not None and (base, cfg.train.init_from) not in experiment.runs:
            raise UserError(f"{base}/{run}: train.init_from names {cfg.train.init_from}, which no table has as a row")
    return experiment


def _table(source: YamlFile) -> Table:
    try:
        return Table.model_validate(source.value)
    except ValidationError as error:
        first = error.errors()[0]
        loc = tuple(k for k in first["loc"] if k in source.value or isinstance(k, int) or len(first["loc"]) == 1)
        keys = ".".join(str(k) for k in first["loc"])
        if first["type"] == "extra_forbidden":
            known = Row.model_fields if "rows" in first["loc"] else Table.model_fields
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"{source.where(*loc)}: no key {first['loc'][-1]}{hint}") from None
        raise UserError(f"{source.where(*loc)}: {keys}: {first['msg']}, got {first['input']!r}") from None


def _owner(name: str, tables: dict[str, Table], sources: dict[str, YamlFile]) -> str:
    """The table whose file writes the rows down: `name` itself, or the end of its chain of `rows: other`."""
    seen = [name]
    while isinstance(rows := tables[seen[-1]].rows, str):
        if rows not in tables or rows in seen:
            near = difflib.get_close_matches(rows, list(tables), n=1)
            hint = f", did you mean {near[0]}?" if near and near[0] not in seen else ""
            raise UserError(f"{sources[seen[-1]].where('rows')}: rows names {rows}, which is no other table{hint}")
        seen.append(rows)
    return seen[-1]


def _add_runs(
    experiment: Experiment, name: str, table: Table, owner: str, sources: dict[str, YamlFile], bases: Path
) -> None:
    values, experiment.bases[table.base] = load_base(table.base, bases)
    seen: set[str] = set()
    for i, row in enumerate(experiment.rows[name]):
        source, place = sources[owner], sources[owner].where("rows", i)
        if row.run in seen:
            raise UserError(f"{place}: row {row.run} appears twice in the table")
        if row.run.startswith("teacher"):
            raise UserError(
                f"{place}: row {row.run}: names that begin with teacher are those of the teacher's samplers"
            )
        seen.add(row.run)
        changes = [
            Change(table.change, sources[name], ("change",)),
            *_preset(experiment, row, source.where("rows", i, "preset"), bases.with_name("presets")),
            Change(row.change, source, ("rows", i, "change")),
            Change(table.row_change.get(row.run, {}), sources[name], ("row_change", row.run)),
        ]
        try:
            changed = apply_change(values, *(change.values for change in changes))
        except KeyError as error:
            key = error.args[0].removeprefix("no key ").split(",")[0]
            where = next(change.where(key) for change in changes if key in change.values)
            raise UserError(f"{where}: row {row.run}: {error.args[0]}") from None
        if changed["eval"]["protocol"] != values["eval"]["protocol"]:
            raise UserError(f"{place}: row {row.run}: eval.protocol belongs to the base: the rows of a table share one")
        cfg = validate(RunConfig, changed, source, "rows", i, "change", changes=changes)
        earlier = experiment.runs.setdefault((table.base, row.run), cfg)
        if earlier != cfg:
            same_base = [t for t in experiment.rows if t != name and experiment.tables[t].base == table.base]
            other = next(t for t in same_base if row.run in [r.run for r in experiment.rows[t]])
            keys = _differences(earlier, cfg)
            raise UserError(f"{place}: row {row.run} contradicts the row of that name in table {other} ({keys})")


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


def _differences(a: RunConfig, b: RunConfig) -> str:
    def leaves(cfg: RunConfig) -> dict[str, Any]:
        return {f"{s}.{k}": v for s, section in cfg.model_dump(mode="json").items() for k, v in section.items()}

    left, right = leaves(a), leaves(b)
    return "; ".join(f"{key}: {left[key]} there, {right[key]} here" for key in left if left[key] != right[key])


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
