"""Ablations as data: bases, tables and their rows become validated runs before any DAG exists."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError, did_you_mean
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.checks.sections import check_all
from dmd2.experiment.checks.shared import check_shared
from dmd2.experiment.checks.table import check_origins, check_table
from dmd2.experiment.config import RunConfig
from dmd2.experiment.dotted_keys import Change, Written, apply_change, differences, holds, validate
from dmd2.experiment.protocols import named
from dmd2.experiment.table_config import Preset, Row, Table, rows_of
from dmd2.experiment.yaml_file import Place, read_yaml

BASES, TABLES = Path("workflow/base"), Path("workflow/tables")
# Suffixes of what is written beside the JSON of a table.
BESIDE = ("md", "csv", "curves.csv", "metrics.yaml")


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
            hint = did_you_mean(run, known, f"; runs of {base}: {', '.join(known) or 'none'}")
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
    cfg = _read_base(name, folder).cfg
    return cfg.model_dump(mode="json"), cfg


def _read_base(name: str, folder: Path) -> Written:
    """A base, whose eval section has the values of the protocol that it names where it gives none."""
    place = _read("base", name, folder)
    values, measured = place.source.value, place.source.value.get("eval")
    if isinstance(measured, dict) and isinstance(measured.get("protocol"), str):
        try:
            values = {**values, "eval": {**named(measured["protocol"]).for_a_base(), **measured}}
        except UserError as error:
            raise UserError(f"{place.where('eval', 'protocol')}: eval.protocol: {error}") from None
    return Written(validate(RunConfig, values, place), place)


def _read(kind: str, name: str, folder: Path) -> Place:
    """The file of a base or preset; UserError with the nearest name if there is none."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"there is no {kind} {path}{did_you_mean(name, [p.stem for p in folder.glob('*.yaml')])}")
    return Place(read_yaml(path))


def load_experiment(tables: Path = TABLES, bases: Path = BASES) -> Experiment:
    """Read every table, merge each row over its base and validate it; presets lie beside the folder of bases.

    Raises:
        UserError: one sentence with file, line and key for the first problem found.
    """
    experiment = Experiment()
    places = {path.stem: Place(read_yaml(path)) for path in sorted(tables.glob("*.yaml"))}
    experiment.tables.update({name: validate(Table, place.source.value, place) for name, place in places.items()})
    specs = {name: table.rows for name, table in experiment.tables.items()}
    read: dict[str, Written] = {}
    written: list[Written] = []  # bases before the rows over them
    for name, table in experiment.tables.items():
        rows = rows_of(name, specs, places)
        experiment.rows[name] = [row for row, _ in rows]
        if table.base not in read:
            read[table.base] = _read_base(table.base, bases)
            written.append(read[table.base])
            experiment.bases[table.base] = read[table.base].cfg
        for row, place in rows:
            changes = _changes(experiment, table, row, places[name], place, bases.with_name("presets"))
            written.append(_run(experiment, name, row, place, read[table.base], changes))
        check_table(table, {row.run for row, _ in rows}, read[table.base].cfg, places[name])
    check_shared(written)
    check_all(written)
    check_origins(experiment.runs)
    return experiment


def _changes(
    experiment: Experiment, table: Table, row: Row, of_table: Place, place: Place, presets: Path
) -> list[Change]:
    """What makes a row of its base, in order; the experiment then knows the row's preset."""
    changes = [Change(table.change, of_table.below("change"))]
    if row.preset is not None:
        try:
            preset = _read("preset", row.preset, presets)
        except UserError as error:
            raise UserError(f"{place.where('preset')}: row {row.run}: {error}") from None
        experiment.presets[row.preset] = validate(Preset, preset.source.value, preset)
        changes.append(Change(experiment.presets[row.preset].change, preset.below("change")))
    changes.append(Change(row.change, place.below("change")))
    return [*changes, Change(table.row_change.get(row.run, {}), of_table.below("row_change", row.run))]


def _run(experiment: Experiment, name: str, row: Row, place: Place, base: Written, changes: list[Change]) -> Written:
    """The config of a row of the table `name`, which the experiment then knows."""
    table = experiment.tables[name]
    try:
        changed = apply_change(base.cfg.model_dump(mode="json"), *(change.values for change in changes))
    except KeyError as error:
        key = error.args[0].removeprefix("no key ").split(",")[0]
        where = next(change.place.where(key) for change in changes if key in change.values)
        raise UserError(f"{where}: row {row.run}: {error.args[0]}") from None
    told = f"{place.where()}: row {row.run}"
    if changed["eval"]["protocol"] != base.cfg.eval.protocol:
        raise UserError(f"{told}: eval.protocol belongs to the base: the rows of a table share one")
    cfg = validate(RunConfig, changed, place.below("change"), changes)
    earlier = experiment.runs.setdefault((table.base, row.run), cfg)
    if earlier != cfg:
        same_base = [t for t in experiment.rows if t != name and experiment.tables[t].base == table.base]
        other = next(t for t in same_base if row.run in [r.run for r in experiment.rows[t]])
        keys = "; ".join(f"{key}: {there} there, {here} here" for key, there, here in differences(earlier, cfg))
        raise UserError(f"{told} contradicts the row of that name in table {other} ({keys})")
    return Written(cfg, base.base, f"row {row.run}: ", changes)
