"""Rows of a table: its own, those of another table, or those with more of its own."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag

from dmd2.core.errors import UserError
from dmd2.experiment.section import Section
from dmd2.experiment.yaml_file import YamlFile

NAME = r"^[a-z0-9][a-z0-9-]*$"


class Row(Section):
    """One run of a table: its name, the change against the base, and what the paper reports for it.

    `preset` names a file in workflow/presets whose change is applied before the row's own.
    """

    run: Annotated[str, Field(pattern=NAME)]
    preset: str | None = None
    change: dict[str, Any] = {}
    paper: dict[str, float | None] = {}


class Extension(Section):
    """All rows of another table and some of one's own; the other table does not get these."""

    origin: Annotated[str, Field(alias="from")]
    add: Annotated[list[Row], Field(min_length=1)]


def _kind(value: Any) -> str:
    return "other" if isinstance(value, str) else "extension" if isinstance(value, dict | Extension) else "own"


KINDS = ("other", "extension", "own")  # pydantic puts the kind that it took into the path of an error
Rows: TypeAlias = Annotated[
    Annotated[list[Row], Tag("own")] | Annotated[str, Tag("other")] | Annotated[Extension, Tag("extension")],
    Discriminator(_kind),
]


@dataclass(frozen=True)
class Placed:
    """A row and where it is written down."""

    row: Row
    source: YamlFile
    keys: tuple[str | int, ...]

    def where(self, *keys: str) -> str:
        """``file:line`` of the row, or of one of its keys."""
        return self.source.where(*self.keys, *keys)


def rows_of(name: str, rows: Mapping[str, Any], sources: Mapping[str, YamlFile]) -> list[Placed]:
    """Rows of the table `name`, given what every table's `rows` says: those it takes from another one come first.

    A table has all its rows, wherever they are written: one that takes them from a table that adds some has these, too.

    Raises:
        UserError: a table that is not there or leads back here, or a row twice.
    """
    placed: list[Placed] = []
    seen = [name]
    while True:
        table, spec = seen[-1], rows[seen[-1]]
        own = spec.add if isinstance(spec, Extension) else [] if isinstance(spec, str) else spec
        keys: tuple[str, ...] = ("rows", "add") if isinstance(spec, Extension) else ("rows",)
        placed = [Placed(row, sources[table], (*keys, i)) for i, row in enumerate(own)] + placed
        if not isinstance(spec, str | Extension):
            break
        key, origin = ("rows.from", spec.origin) if isinstance(spec, Extension) else ("rows", spec)
        if origin not in rows or origin in seen:
            near = difflib.get_close_matches(origin, [t for t in rows if t not in seen], n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{sources[table].where(*key.split('.'))}: {key} names {origin}, which is no other table{hint}"
            )
        seen.append(origin)
    if not placed:
        raise UserError(f"{sources[name].where('rows')}: rows is empty: a table needs a row")
    known: dict[str, Placed] = {}
    for row in placed:
        if row.row.run.startswith("teacher"):
            told = "names that begin with teacher are those of the teacher's samplers"
            raise UserError(f"{row.where()}: row {row.row.run}: {told}")
        if row.row.run in known:
            first = known[row.row.run].where()
            raise UserError(f"{row.where()}: row {row.row.run} appears twice in the table, the first time at {first}")
        known[row.row.run] = row
    return placed
