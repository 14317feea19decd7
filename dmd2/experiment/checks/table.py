"""Whether a table asks for what its base measures and its rows are; imports no torch."""

from collections.abc import Iterator, Mapping

from dmd2.core.errors import UserError
from dmd2.experiment.config import RunConfig
from dmd2.experiment.dotted_keys import holds
from dmd2.experiment.metrics import BETTER, FRECHET, measured
from dmd2.experiment.table_config import Table
from dmd2.experiment.yaml_file import Place

Problem = tuple[tuple[str | int, ...], str]  # keys of a table, and a sentence


def check_table(table: Table, rows: set[str], base: RunConfig, place: Place) -> None:
    """Refuse a table that names what its rows or its base do not have.

    Raises:
        UserError: one sentence with file, line and key for the first problem.
    """
    for keys, told in _problems(table, rows, base):
        raise UserError(f"{place.where(*keys)}: {told}")


def _problems(table: Table, rows: set[str], base: RunConfig) -> Iterator[Problem]:
    for column, condition in table.columns.items():
        try:
            holds(condition, base)
        except ValueError as error:
            yield ("columns", column), str(error)
    if table.reference_row is not None and table.reference_row not in rows:
        yield ("reference_row",), f"reference_row {table.reference_row} is no row of the table"
    known = measured(base.eval.metrics)
    for i, metric in enumerate(table.metrics):
        if metric not in known:
            yield ("metrics", i), f"base {table.base} does not measure {metric}, only {', '.join(known)}"
    yield from _directions(table)
    for teacher in table.teachers.keys() - base.eval.teacher_samplers.keys():
        yield ("teachers", teacher), f"base {table.base} has no sampler {teacher}"
    for run in table.row_change.keys() - rows:
        yield ("row_change", run), f"row_change names {run}, which is no row of the table"


def _directions(table: Table) -> Iterator[Problem]:
    """The best by a metric of which neither direction is better, and claims without what they are about."""
    first, shown = table.metrics[0], ", ".join(table.metrics)
    if table.select == "best" and first not in BETTER:
        told = f"neither the lowest nor the highest {first} is the best: name another first, or select: last"
        yield ("select",), f"select: best goes by the first of metrics, and {told}"
    about = [claim for claim in table.claims if claim != "C2"]  # that one is about brightness over training
    if about and not set(FRECHET) & set(table.metrics):
        told = f"metrics ({shown}) has no {' or '.join(FRECHET)}: add one, or leave the claim out"
        yield ("claims",), f"claims: {about[0]} is about the paper's FID, and {told}"


def check_origins(runs: Mapping[tuple[str, str], RunConfig]) -> None:
    """Refuse a `train.init_from` that names no row, or leads back to where it started, given all runs by (base, row).

    Raises:
        UserError: with the chain of rows.
    """
    for (base, run), cfg in runs.items():
        seen = [run]
        while (origin := cfg.train.init_from) is not None:
            if (base, origin) not in runs:
                raise UserError(f"{base}/{seen[-1]}: train.init_from names {origin}, which no table has as a row")
            if origin in seen:
                chain = " from ".join([*seen, origin])
                raise UserError(f"{base}/{run}: train.init_from leads in a circle: {chain}")
            seen.append(origin)
            cfg = runs[base, origin]
