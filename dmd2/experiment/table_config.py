"""Tables as they are written. A table has rows of its own, those of another table, or both."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from dmd2.core.errors import UserError, did_you_mean
from dmd2.experiment.section import Distinct, Section
from dmd2.experiment.yaml_file import Place

MIN_SEEDS = 3  # trainings of each row that a verdict on a claim needs
NAME = r"^[a-z0-9][a-z0-9-]*$"


class Row(Section):
    """One run of a table: its name, the change against the base, and the paper's numbers of it.

    preset: file in workflow/presets with a change that is applied before the row's own.
    """

    run: Annotated[str, Field(pattern=NAME, description="name of the run")]
    preset: str | None = None
    change: Annotated[dict[str, Any], Field(description="dotted keys of the base, with their values")] = {}
    paper: Annotated[dict[str, float | None], Field(description="the paper's numbers of it")] = {}


class Extension(Section):
    """All rows of another table, and more of the table's own."""

    origin: Annotated[str, Field(alias="from", description="table whose rows are taken")]
    add: Annotated[list[Row], Field(min_length=1, description="further rows")]


def _kind(value: Any) -> str:
    kind = "other" if isinstance(value, str) else "extension" if isinstance(value, dict | Extension) else "own"
    return f"union:{kind}"  # which pydantic puts into the path of an error


Rows: TypeAlias = Annotated[
    Annotated[list[Row], Tag("union:own")]
    | Annotated[str, Tag("union:other")]
    | Annotated[Extension, Tag("union:extension")],
    Discriminator(_kind),
]


# eval/report/claims.yaml says what they are, with their tests.
ClaimName = Literal[
    "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15", "C16",
    "F1", "F2", "F3", "F4", "F5", "F6", "F8"
]  # fmt: skip


RuleName = Literal["below", "above", "faster", "equivalent", "no_gain"]  # functions of eval/report/rules.py


class ClaimTest(Section):
    """Two rows, a metric of both, and the rule that judges its values over seeds."""

    metric: Annotated[
        str,
        Field(
            description="one of the table, brightness_std, distance (its first Frechet distance) or patch (of patches)"
        ),
    ]
    a: Annotated[str, Field(description="row, teacher-SAMPLER, or teacher: the sampler that was distilled")]
    b: Annotated[str, Field(description="the same, or `published best`: of other methods")]
    rule: Annotated[RuleName, Field(description="see the rules of claims")]
    margin: Annotated[
        float | None, Field(gt=0, description="of equivalent and no_gain, as a share of b; null: 0.05")
    ] = None

    @model_validator(mode="after")
    def _with_a_margin(self) -> Self:
        if self.margin is not None and self.rule not in ("equivalent", "no_gain"):
            raise ValueError(f"margin is of the rules equivalent and no_gain, and rule is {self.rule}: leave it out")
        return self


class Claim(ClaimTest):
    """A claim with its test.

    paper: the paper's numbers of it.
    also: further tests; the claim is supported if all are, and refuted if one is.
    """

    id: Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="short name")]
    claim: Annotated[str, Field(description="what it says")]
    paper: str = ""
    also: list[ClaimTest] = []

    @property
    def tests(self) -> list[ClaimTest]:
        """All tests of the claim."""
        return [self, *self.also]


TableClaim: TypeAlias = Annotated[
    Annotated[ClaimName, Tag("union:paper")] | Annotated[Claim, Tag("union:own")],
    Discriminator(lambda value: "union:own" if isinstance(value, dict | Claim) else "union:paper"),
]
Seed = Annotated[int, Field(ge=0)]


class Preset(Section):
    """A change with a name, for rows of any table."""

    title: Annotated[str, Field(description="one line")]
    change: Annotated[dict[str, Any], Field(description="dotted keys, with their values")]


class Table(Section):
    """One table or figure.

    rows: a list of rows, the name of another table whose rows are taken with the paper's numbers, or both: `{from:
        other table, add: [rows]}`.
    change: applies to all rows, before their preset and their own change.
    row_change: applies to single rows, after their own change. Both are taken with the rows of another table of the
        same base, so that these are the same runs.
    claims: names of the paper's claims, and claims of one's own.
    """

    title: Annotated[str, Field(description="one line")]
    base: Annotated[str, Field(description="file in workflow/base")]
    rows: Rows
    metrics: Annotated[
        Annotated[list[str], Field(min_length=1), Distinct],
        Field(description="what the table shows of what the base measures, the first one with intervals"),
    ] = ["fd"]
    seeds: Annotated[
        Annotated[list[Seed], Field(min_length=1), Distinct], Field(description="training seeds of each row")
    ] = [0]
    select: Annotated[
        str,
        Field(
            pattern="^(last|best)$",
            description="the snapshot that counts: the last one, or the best by the first metric",
        ),
    ] = "last"
    columns: Annotated[
        dict[str, str], Field(description="columns of ticks: title, and a condition on the row's configuration")
    ] = {}
    change: dict[str, Any] = {}
    row_change: dict[str, dict[str, Any]] = {}
    teachers: Annotated[
        dict[str, dict[str, float | None]],
        Field(description="samplers of the base's `teacher_samplers` to list, with the paper's numbers"),
    ] = {}
    published: Annotated[dict[str, dict[str, float]], Field(description="numbers of other methods, for claims")] = {}
    claims: Annotated[list[TableClaim], Distinct] = []
    beside: Annotated[
        str | None, Field(description="another table, whose rows of the same names are shown beside, once it is made")
    ] = None
    reference_row: Annotated[str | None, Field(description="row that differences are taken from")] = None
    notes: Annotated[str, Field(description="text below the table")] = ""


def rows_of(
    name: str, tables: Mapping[str, Table], places: Mapping[str, Place], without: Collection[str] = ()
) -> list[tuple[Row, Place, list[str]]]:
    """All rows of the table `name`; those that it takes from another table come first.

    With each are where it is written, and the tables whose `change` and `row_change` it has, in order: those of the
    same base that it was taken through, and `name`.

    A table that takes its rows from one that adds some has these, too. Tables `without` cannot be read.

    Raises:
        UserError: a table that is not there or leads back here, or a row twice.
    """
    found: list[tuple[Row, Place, list[str]]] = []
    seen = [name]
    while True:
        rows, place = tables[seen[-1]].rows, places[seen[-1]].below("rows")
        changed = [table for table in reversed(seen) if tables[table].base == tables[name].base]
        if isinstance(rows, list):
            found = [(row, place.below(i), changed) for i, row in enumerate(rows)] + found
            break
        if isinstance(rows, Extension):
            found = [(row, place.below("add", i), changed) for i, row in enumerate(rows.add)] + found
            origin, key, where = rows.origin, "rows.from", place.where("from")
        else:
            origin, key, where = rows, "rows", place.where()
        if origin in without:
            raise UserError(f"{where}: {key} names {origin}, which cannot be read")
        if origin not in tables or origin in seen:
            hint = did_you_mean(origin, (t for t in tables if t not in seen))
            raise UserError(f"{where}: {key} names {origin}, which is no other table{hint}")
        seen.append(origin)
    if not found:
        raise UserError(f"{places[name].where('rows')}: rows is empty: a table needs a row")
    first: dict[str, str] = {}
    for row, place, _ in found:
        where = place.where()
        if row.run.startswith("teacher"):
            raise UserError(
                f"{where}: row {row.run}: names that begin with teacher are those of the teacher's samplers"
            )
        if row.run in first:
            raise UserError(f"{where}: row {row.run} appears twice in the table, the first time at {first[row.run]}")
        first[row.run] = where
    return found
