"""Reads bases, tables and their rows, and makes validated configs of runs before there is a DAG."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import TableError, UserError, did_you_mean
from dmd2.core.files import sha256
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.checks.sections import check_all
from dmd2.experiment.checks.tables import Known, check_origins, check_shared, check_table
from dmd2.experiment.config import RunConfig
from dmd2.experiment.dotted_keys import LocatedConfig, apply_change, differences, holds, validate
from dmd2.experiment.inheritance import read_base
from dmd2.experiment.protocols import named
from dmd2.experiment.table_config import Preset, Row, Table, rows_of
from dmd2.experiment.yaml_file import Place, read_named, read_yaml, workflow_files

BASES, TABLES = Path("workflow/base"), Path("workflow/tables")
MADE = (Path("results/tables"), Path("results/reference"))  # tables of results: of this workspace, and shipped ones
# Suffixes of the files that are written beside the JSON of a table; a file for each row is in `metrics/TABLE` there.
BESIDE = ("md", "csv", "curves.csv")
# Suffixes of the page of a table and of the files that are written beside it.
PAGE = ("html", "tex", "curves.svg", "curves.pdf", "training.svg", "training.pdf")


@dataclass(frozen=True)
class Experiment:
    """Everything that the tables describe: tables and their rows by name of the table, configs by (base, run)."""

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
            hint = did_you_mean(run, known, f"; runs of {base}: {', '.join(known) or 'none'}")
            raise UserError(f"no table has the run {base}/{run}{hint}")
        return self.runs[base, run]

    def shown(self, table: str) -> Any:
        """What the text of a table depends on besides metrics: an edited number of the paper remakes only the table."""
        rows = [row.settings() for row in self.rows[table]]
        presets = {row.preset: self.presets[row.preset].change for row in self.rows[table] if row.preset is not None}
        beside = self.beside(table)
        read = [] if beside is None else [sha256(beside)]
        return [self.tables[table].settings(), rows, presets, "metrics by row", *read]

    def beside(self, table: str) -> Path | None:
        """The record of the table that is shown beside this one, made here or else shipped, if there is one.

        It is no input of the table: its rows are not trained for a column of another table.
        """
        name = self.tables[table].beside
        return next((file for folder in MADE if name and (file := folder / f"{name}.json").exists()), None)

    def measured(self, table: str) -> list[str]:
        """Files of metrics that a table is made from."""
        spec = self.tables[table]
        runs = [RunId(spec.base, row.run, seed).folder for row in self.rows[table] for seed in spec.seeds]
        return [str(folder / "metrics.json") for folder in [*runs, *(SAMPLERS / spec.base / s for s in spec.teachers)]]

    def ticks(self, table: str, run: str) -> dict[str, bool]:
        """Ticks of a run by column, computed from its config."""
        spec = self.tables[table]
        return {name: holds(cond, self.runs[spec.base, run]) for name, cond in spec.columns.items()}


def load_base(name: str, folder: Path = BASES) -> RunConfig:
    """The run that a base describes; see `load_experiment` for errors."""
    located = _base(name, folder)
    check_all([located], {located.cfg.data.name: located.cfg.data})
    return located.cfg


def _base(name: str, folder: Path) -> LocatedConfig:
    """A base. Keys that its eval section leaves out have the values of the protocol that it names."""
    values, place = read_base(name, folder)
    measured = values.get("eval")
    if isinstance(measured, dict) and isinstance(measured.get("protocol"), str):
        try:
            values = {**values, "eval": {**named(measured["protocol"]).for_a_base(), **measured}}
        except UserError as error:
            raise UserError(f"{place.where('eval', 'protocol')}: eval.protocol: {error}") from None
    return LocatedConfig(validate(RunConfig, values, place), place)


def load_experiment(tables: Path = TABLES, bases: Path = BASES, without: Collection[str] = ()) -> Experiment:
    """Read all bases and tables, merge each row over its base and validate it; presets lie beside the folder of bases.

    Tables `without` are not read.

    Raises:
        TableError: one sentence with file, line and key for the first problem found in a table.
        UserError: the same of a base.
    """
    experiment, places = Experiment(), dict[str, Place]()
    files = {name: path for name, path in workflow_files(tables).items() if name not in without}
    # Those of the workspace after those that come with dmd2: the user's is at fault where two contradict each other.
    files = dict(sorted(files.items(), key=lambda item: not item[1].is_absolute()))
    for name, path in files.items():
        with _at_fault(name):
            _check_name(path)
            if name == "index":
                raise UserError(f"{path}: index is the page with the list of all tables: rename the file")
            values, places[name] = read_yaml(path)
            experiment.tables[name] = validate(Table, values, places[name])
    read = dict[str, LocatedConfig]()
    for name, path in workflow_files(bases).items():
        _check_name(path)
        read[name] = _base(name, bases)
    experiment.bases.update({name: base.cfg for name, base in read.items()})
    located = {name: list[LocatedConfig]() for name in files}
    for name, table in experiment.tables.items():
        with _at_fault(name):
            base = read.get(table.base) or _base(table.base, bases)  # which tells that there is none
            rows, of_table = rows_of(name, experiment.tables, places, without), places[name]
            experiment.rows[name] = [row for row, *_ in rows]
            for row, place, changed in rows:
                changes = [(experiment.tables[t].change, places[t].below("change")) for t in changed]
                if row.preset is not None:
                    experiment.presets[row.preset], of_preset = _preset(row, place, bases.with_name("presets"))
                    changes.append((experiment.presets[row.preset].change, of_preset.below("change")))
                changes.append((row.change, place.below("change")))
                own = ((experiment.tables[t].row_change, places[t].below("row_change", row.run)) for t in changed)
                changes += [(of_rows.get(row.run, {}), written) for of_rows, written in own]
                located[name].append(_row(row, place, base, changes))
                here = place if place.file == of_table.file else of_table.below("rows")  # the file that is at fault
                _add(experiment, name, row.run, located[name][-1].cfg, here)
            check_table(table, {row.run for row, *_ in rows}, base.cfg, of_table)
            _check_beside(name, experiment.tables, of_table)
    _check_together(experiment, list(read.values()), located)
    return experiment


def readable_tables() -> tuple[Experiment, dict[str, str]]:
    """The tables of the workspace that can be read, and what is wrong with each of the others, by name.

    Raises:
        UserError: a base cannot be read.
    """
    wrong = dict[str, str]()
    while True:
        try:
            return load_experiment(without=wrong), wrong
        except TableError as error:
            wrong[error.table] = str(error)


def experiment_with(table: str) -> Experiment:
    """All tables that can be read, and this one.

    Raises:
        UserError: this one, or a base, cannot be read.
    """
    experiment, wrong = readable_tables()
    if table in wrong:
        raise UserError(wrong[table])
    return experiment


@contextmanager
def _at_fault(table: str) -> Iterator[None]:
    """Name the table in an error that is told meanwhile."""
    try:
        yield
    except UserError as error:
        raise TableError(str(error), table) from None


def _check_name(path: Path) -> None:
    """Refuse a file whose name cannot be part of commands and of names of files."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", path.stem):
        raise UserError(f"{path}: {path.stem!r} is no name: rename the file, with letters, digits, - and _ only")


def _check_beside(name: str, tables: dict[str, Table], place: Place) -> None:
    """The table beside another must be one, with the same first metric."""
    beside, known = tables[name].beside, {other: table for other, table in tables.items() if other != name}
    if beside is None:
        return
    if beside not in known:
        raise UserError(f"{place.where('beside')}: beside: {beside} is no other table{did_you_mean(beside, known)}")
    metric = tables[name].metrics[0]
    if metric not in known[beside].metrics:
        told = f"beside: table {beside} shows no {metric}, the first of metrics here"
        raise UserError(f"{place.where('beside')}: {told}")


def _check_together(experiment: Experiment, bases: list[LocatedConfig], rows: dict[str, list[LocatedConfig]]) -> None:
    """Check the configs of bases, and those of the rows by table, as far as one depends on others."""
    everything = [*bases, *(one for of_table in rows.values() for one in of_table)]
    sets = {one.cfg.data.name: one.cfg.data for one in everything}
    known = Known()
    check_shared(bases, known)
    check_all(bases, sets)
    for name, of_table in rows.items():
        with _at_fault(name):
            check_shared(of_table, known)
            check_all(of_table, sets)
            base = experiment.tables[name].base
            check_origins(base, [row.run for row in experiment.rows[name]], experiment.runs)


def _preset(row: Row, place: Place, folder: Path) -> tuple[Preset, Place]:
    """The preset that a row names, and where it is written."""
    try:
        values, written = read_named("preset", str(row.preset), folder)
    except UserError as error:
        raise UserError(f"{place.where('preset')}: row {row.run}: {error}") from None
    return validate(Preset, values, written), written


def _row(row: Row, place: Place, base: LocatedConfig, changes: list[tuple[dict[str, Any], Place]]) -> LocatedConfig:
    """The config of a row: its base with these changes, in order."""
    values, changed_at = base.cfg.model_dump(mode="json"), dict[str, str]()
    for change, written in changes:
        try:
            values = apply_change(values, change)
        except KeyError as error:
            key, told = error.args
            raise UserError(f"{written.where(key)}: row {row.run}: {told}") from None
        for key in change:
            changed_at.pop(key, None)  # the newest is the last
            changed_at[key] = written.where(key)
    if values["eval"]["protocol"] != base.cfg.eval.protocol:
        told = "eval.protocol belongs to the base: the rows of a table share one"
        raise UserError(f"{place.where()}: row {row.run}: {told}")
    cfg = validate(RunConfig, values, place.below("change"), changed_at)
    return LocatedConfig(cfg, base.base, f"row {row.run}: ", changed_at)


def _add(experiment: Experiment, name: str, run: str, cfg: RunConfig, place: Place) -> None:
    """Add a run of the table `name`; the same run of another table must have the same config."""
    base = experiment.tables[name].base
    known = experiment.runs.setdefault((base, run), cfg)
    if known != cfg:
        others = [t for t in experiment.rows if t != name and experiment.tables[t].base == base]
        other = next(t for t in others if run in [row.run for row in experiment.rows[t]])
        keys = "; ".join(f"{key}: {there} there, {here} here" for key, there, here in differences(known, cfg))
        told = f"contradicts the row of that name in table {other} ({keys}): rename one, or give both the same change"
        raise UserError(f"{place.where()}: row {run} {told}")
