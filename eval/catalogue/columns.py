"""What the columns of the run catalogue mean: type, unit and a sentence, also stored in its Parquet files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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
    """What a column holds; an empty unit means none."""

    type: str
    unit: str
    meaning: str


STATES = (
    "evaluated; outdated: metrics of an earlier training than the folder's present one; trained: not evaluated yet; "
    "ended: trained, and the next snakemake call publishes it; running; stopped: incomplete and no process holds it "
    "(what Slurm knows: python -m dmd2.launch status); not started; unreadable: a file is damaged, see the warnings"
)
# Always there, missing values where they do not apply.
SCHEMA = {name: Column(*about) for name, *about in [
    ("base", "string", "", "base configuration, the first part of the run's name"),
    ("row", "string", "", "row of the tables; teacher-SAMPLER for a sampler of the teacher"),
    ("seed", "int64", "", "training seed; missing for teachers"),
    ("kind", "string", "", "student or teacher"),
    ("state", "string", "", STATES),
    ("run", "string", "", "base/row/seedN; base/teacher-SAMPLER for teachers"),
    ("digest", "string", "", "key of configuration, inputs and seed, which names checkpoints and snapshots; of an "
     "incomplete run that of its latest such folder"),
    ("step", "int64", "iterations", "iteration of the snapshot; of an incomplete run the last one reported"),
    ("student_updates", "int64", "updates", "updates of the student until this snapshot"),
    ("is_last", "bool", "", "the last snapshot of a complete training (final weights); true for teachers"),
    ("steps", "int64", "iterations", "length of the complete training"),
    ("brightness_std", "float64", NUMBERS["brightness_std"].unit, NUMBERS["brightness_std"].meaning),
    ("protocol_detector", "string", "", "network of the features, with the digest of its weights"),
    ("protocol_reference", "string", "", "reference set, with its digest and number of images"),
    ("protocol_images", "int64", "images", "generated images per draw"),
    ("protocol_draws", "int64", "draws", "draws whose metrics are averaged"),
    ("protocol_labels", "string", "", "how the classes of the images are chosen"),
    ("protocol_rounding", "string", "", "how images become 8-bit"),
    ("protocol_precision", "string", "", "arithmetic of the sampling: fp32, tf32 or bf16; detectors run in float32"),
    ("protocol_covariance_init", "string", "", "start of the covariance sum: zeros, or ones as in DMD2's evaluator"),
    ("gpu_hours", "float64", "h", "GPU-hours of the whole training, of all its snapshots together"),
    ("cpu_hours", "float64", "h", "CPU-hours of the whole training, of all its snapshots together"),
    ("cost_source", "string", "", "who counted the hours: sacct (every restart) or wall clock"),
    ("starts", "int64", "starts", "times that Slurm started the training"),
    ("seconds", "float64", "s", "time in training iterations, of the whole training"),
    ("eval_seconds", "float64", "s", "time of the evaluation of all snapshots"),
    ("network_calls", "int64", "calls", "calls of the network per image, of a teacher's sampler"),
    ("device", "string", "", "cpu or name of the GPU that trained"),
    ("processes", "int64", "processes", "processes of the training"),
    ("threads", "int64", "threads", "CPU threads per process"),
    ("restarts", "int64", "restarts", "restarts by Slurm of the job that finished the training"),
    ("torch", "string", "", "PyTorch version that trained"),
    ("train_commit", "string", "", "commit of the training, + if files differed from it"),
    ("eval_commit", "string", "", "commit of the evaluation, + if files differed from it"),
    ("weights_path", "string", "", "snapshot, relative to the workspace"),
    ("weights_sha256", "string", "", "SHA-256 of the snapshot as recorded after training"),
    ("weights_bytes", "int64", "B", "size of the snapshot"),
]}  # fmt: skip
METRICS = {name: (number.unit, number.meaning) for name, number in NUMBERS.items() if name not in SCHEMA}
SUFFIXES = {
    "se": Column("float64", "unit of NAME", "standard error of NAME from the finite number of images"),
    "low": Column("float64", "unit of NAME", "lower end of the 95 % interval around NAME - NAME_bias"),
    "high": Column("float64", "unit of NAME", "upper end of that interval"),
    "bias": Column("float64", "unit of NAME", "what NAME exceeds its infinite-sample value by"),
    "n": Column("int64", "images", "number of images behind NAME"),
}
SEVERAL = "; lists and columns of mixed types as JSON text"
PREFIXES = {
    "protocol_": Column("as recorded", "", "NAME of the evaluation protocol" + SEVERAL),
    "config.": Column("as in YAML", "", "key NAME of the run's complete configuration" + SEVERAL),
    "sampler.": Column("as in YAML", "", "NAME of a teacher's sampler" + SEVERAL),
}
LOG_SCHEMA = {
    "run": Column("category", "", "base/row/seedN, as in the catalogue"),
    "step": Column("int64", "iterations", "iteration after which the value was logged"),
    "name": Column("category", "", "what was logged: seconds (of training until then), student/dm, critic/denoise ..."),
    "value": Column("float64", "", "its value: seconds, losses, norms, probabilities, or image statistics"),
}


def describe(columns: Iterable[str]) -> dict[str, Column]:
    """Meaning of every column of a catalogue; a column nothing is known about is left out."""
    names = list(columns)
    metrics = {name.removesuffix("_se") for name in names if name.endswith("_se")}
    found: dict[str, Column] = {}
    for name in names:
        stem, _, suffix = name.rpartition("_")
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        if name in SCHEMA:
            found[name] = SCHEMA[name]
        elif name in metrics:
            found[name] = Column("float64", *METRICS.get(name, ("", f"{name} of eval.metrics")))
        elif stem in metrics and suffix in SUFFIXES:
            about, unit = SUFFIXES[suffix], METRICS.get(stem, ("",))[0]
            unit = about.unit.replace("unit of NAME", unit)
            found[name] = Column(about.type, unit, about.meaning.replace("NAME", stem))
        elif prefix:
            about = PREFIXES[prefix]
            found[name] = Column(about.type, "", about.meaning.replace("NAME", name.removeprefix(prefix)))
    return found


def explained() -> str:
    """All of the above for reading, one column a line."""
    own = {f"METRIC {name}": Column("float64", *about) for name, about in METRICS.items()}
    ends = {f"NAME_{suffix}": about for suffix, about in SUFFIXES.items()}
    rest = {f"{prefix}NAME": about for prefix, about in PREFIXES.items()}
    parts = {"catalogue": SCHEMA | own | ends | rest, "logs": LOG_SCHEMA}
    lines = []
    for part, columns in parts.items():
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
