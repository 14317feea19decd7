"""What the columns of the run catalogue mean, as ``columns.yaml`` says; also stored in its Parquet files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dmd2.core.files import atomic
from dmd2.experiment.metrics import NUMBERS

MAX_INT = 2**63 - 1
# What a column's type is in pandas, and in the JSON it comes from.
DTYPES = {"bool": "boolean", "int64": "Int64", "float64": "float64", "string": "string"}
IN_JSON: dict[str, set[type]] = {
    "bool": {bool, NoneType}, "int64": {int, NoneType}, "float64": {float, int, NoneType}, "string": {str, NoneType},
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """What a column holds; an empty unit means none. `record` names the keys of records whose value it is."""

    type: str
    unit: str = ""
    meaning: str = ""
    record: tuple[str, ...] = ()

    def of(self, name: str, unit: str = "") -> "Column":
        """The column with a metric or key in place of NAME."""
        return replace(self, unit=self.unit.replace("unit of NAME", unit), meaning=self.meaning.replace("NAME", name))


SCHEMA, SUFFIXES, PREFIXES, LOG_SCHEMA = (
    {name: Column(**about) for name, about in part.items()}
    for part in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).values()
)
METRICS = {name: Column("float64", number.unit, number.meaning) for name, number in NUMBERS.items()}
SCHEMA |= {name: replace(METRICS.pop(name), record=SCHEMA[name].record) for name in SCHEMA.keys() & METRICS.keys()}


def describe(columns: Iterable[str]) -> dict[str, Column]:
    """Meaning of every column of a catalogue; a column nothing is known about is left out."""
    names, known = list(columns), dict(SCHEMA)
    for metric in (name.removesuffix("_se") for name in names if name.endswith("_se")):
        number = METRICS.get(metric, Column("float64", meaning=f"{metric} of eval.metrics"))
        known |= {metric: number} | {
            f"{metric}_{end}": about.of(metric, number.unit) for end, about in SUFFIXES.items()
        }
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix and name not in known:
            known[name] = PREFIXES[prefix].of(name.removeprefix(prefix))
    return {name: known[name] for name in names if name in known}


def explained() -> str:
    """All of the above for reading, one column a line."""
    own = {f"METRIC {name}": about for name, about in METRICS.items()}
    ends = {f"NAME_{suffix}": about for suffix, about in SUFFIXES.items()}
    rest = {f"{prefix}NAME": about for prefix, about in PREFIXES.items()}
    lines = []
    for part, columns in {"catalogue": SCHEMA | own | ends | rest, "logs": LOG_SCHEMA}.items():
        lines += [f"# {part}", f"{'column':<26}{'type':<12}{'unit':<23}meaning"]
        lines += [f"{name:<26}{c.type:<12}{c.unit:<23}{c.meaning}".rstrip() for name, c in columns.items()]
    return "\n".join(lines)


def write_parquet(table: pd.DataFrame, path: Path, columns: Mapping[str, Column]) -> None:
    """Write a table to `path` atomically; every field's metadata has the keys ``unit`` and ``description``."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [
        field.with_metadata({"unit": columns[field.name].unit, "description": columns[field.name].meaning})
        for field in arrow.schema
    ]
    described = pa.Table.from_arrays(arrow.columns, schema=pa.schema(fields, arrow.schema.metadata))
    with atomic(path) as temporary:
        pq.write_table(described, temporary, compression="zstd")
