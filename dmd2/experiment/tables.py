"""Reads bases, tables and their rows, and makes validated configs of runs before there is a DAG."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError, did_you_mean
from dmd2.core.files import sha256
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.checks.sections import check_all
from dmd2.experiment.checks.tables import check_origins, check_shared, check_table
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
    check_all([located])
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


def load_experiment(tables: Path = TABLES, bases: Path = BASES) -> Experiment:
    """Read all bases and tables, merge each row over its base and validate it; presets lie beside the folder of bases.

    Raises:
        UserError: one sentence with file, line and key for the first problem found.
    """
    experiment, places = Experiment(), dict[str, Place]()
    for path in [*workflow_files(tables).values(), *workflow_files(bases).values()]:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", path.stem):  # it is part of commands and of names of files
            raise UserError(f"{path}: {path.stem!r} is no name: rename the file, with letters, digits, - and _ only")
    for name, path in workflow_files(tables).items():
        if name == "index":
            raise UserError(f"{path}: index is the page with the list of all tables: rename the file")
        values, places[name] = read_yaml(path)
        experiment.tables[name] = validate(Table, values, places[name])
    of_tables = (table.base for table in experiment.tables.values())
    read = {name: _base(name, bases) for name in dict.fromkeys([*of_tables, *workflow_files(bases)])}
    experiment.bases.update({name: base.cfg for name, base in read.items()})
    configs = list(read.values())  # bases before the rows over them
    for name, table in experiment.tables.items():
        rows, of_table = rows_of(name, experiment.tables, places), places[name]
        experiment.rows[name] = [row for row, _ in rows]
        for row, place in rows:
            changes = [(table.change, of_table.below("change"))]
            if row.preset is not None:
                experiment.presets[row.preset], of_preset = _preset(row, place, bases.with_name("presets"))
                changes.append((experiment.presets[row.preset].change, of_preset.below("change")))
            changes.append((row.change, place.below("change")))
            changes.append((table.row_change.get(row.run, {}), of_table.below("row_change", row.run)))
            configs.append(_row(row, place, read[table.base], changes))
            _add(experiment, name, row.run, configs[-1].cfg, place)
        check_table(table, {row.run for row, _ in rows}, read[table.base].cfg, of_table)
        _check_beside(name, experiment.tables, of_table)
    check_shared(configs)
    check_all(configs)
    check_origins(experiment.runs)
    return experiment


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
        told = f"contradicts the row of that name in table {other} ({keys})"
        raise UserError(f"{place.where()}: row {run} {told}")
