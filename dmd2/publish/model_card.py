"""The model card of an exported student: what it is, how to sample it, what was measured, whose licence it carries."""

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dmd2.core.files import read_json
from dmd2.experiment.config import digest
from dmd2.publish.table_text import NONE, cells, label, stand_in
from dmd2.publish.template import TEMPLATES, template
from dmd2.training.snapshot import Snapshot

TABLES = Path("results/tables")
ENDS = ("low", "high")
LICENCES = (  # identifiers a model card's `license` may have; anything else is `other` with a name
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++", "creativeml-openrail-m",
)  # fmt: skip
ORIGINS = {"sklearn-digits": "the handwritten digits that scikit-learn ships (UCI, 1,797 images of 8x8)"}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def model_card(
    snapshot: Snapshot, sampling: dict[str, Any], script: str, checked: str, licence: str | None
) -> ModelCard:
    """The card with its metadata.

    Args:
        sampling: what the sampling script was rendered from (see `dmd2.publish.export.sampling_of`).
        checked: how the script's images compared with ours, or "". licence: what the user said about the teacher's.
    """
    kind = snapshot.cfg.data.source.kind
    body = template(TEMPLATES / "card.md.j2").render({
        **sampling, "snapshot": snapshot, "cfg": snapshot.cfg, "record": snapshot.record, "count": _steps(sampling),
        "digest": digest(snapshot.cfg), "origin": ORIGINS.get(kind), "script": script, "checked": checked,
        "measured": measured_lines(snapshot), "is_fd": "fd" in _values(snapshot), "tables": table_rows(snapshot),
        "licence": licence, "config": yaml.safe_dump(snapshot.record["config"], sort_keys=False),
    })  # fmt: skip
    return ModelCard(f"---\n{metadata(snapshot, sampling, licence).to_yaml()}\n---\n\n{body}")


def metadata(snapshot: Snapshot, sampling: dict[str, Any], licence: str | None) -> ModelCardData:
    """The card's YAML head; measured values become its model index."""
    task = "unconditional-image-generation" if sampling["labelled"] else "text-to-image"
    known = licence is None or licence.lower() in LICENCES
    data = snapshot.cfg.data.name
    results = [
        EvalResult(task_type=task, dataset_type=data, dataset_name=data, metric_type=metric, metric_value=value,
                   metric_name=_long_name(metric, snapshot))
        for metric, value in _values(snapshot).items() if metric != "brightness"
    ]  # fmt: skip
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=("unknown" if licence is None else licence.lower()) if known else "other",
        license_name=None if known else licence,
        tags=["diffusion", "distillation", "dmd2", f"{_steps(sampling)}-step",
              "class-conditional" if sampling["labelled"] else "text-conditional",
              *["lora"] * bool(sampling["lora"])],
        model_name=str(snapshot.run).replace("/", "-") if results else None,
        eval_results=results or None,
    )  # fmt: skip


def _steps(sampling: dict[str, Any]) -> str:
    count = len(sampling["times"])
    return COUNTS.get(count, str(count))


def _values(snapshot: Snapshot) -> dict[str, float]:
    estimates = snapshot.measured["estimates"] if snapshot.measured else {}
    return {metric: e["value"] for metric, e in estimates.items() if math.isfinite(e["value"])}


def _long_name(metric: str, snapshot: Snapshot) -> str:
    assert snapshot.metrics is not None
    detector = snapshot.metrics["protocol"]["detector"]
    if metric == "fd":
        return f"Fréchet distance in the features of {detector} (FD)"
    return f"{label(metric)} ({detector})"


def measured_lines(snapshot: Snapshot) -> list[list[str]]:
    """Cells per metric: name, value, standard error, bias, interval, number of images."""
    lines = []
    for metric, e in (snapshot.measured or {"estimates": {}})["estimates"].items():
        value, se, bias, low, high = (NONE if e[k] is None else f"{e[k]:.4g}" for k in ("value", "se", "bias", *ENDS))
        lines.append([label(metric), value, se, bias, NONE if low == NONE else f"[{low}, {high}]", str(e["n"])])
    return lines


def table_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Each table of results/tables that was made from this very training, with the cells of the run's row."""
    found, run, seed = [], snapshot.run, str(snapshot.run.seed)
    made_from = (snapshot.record["seconds"], snapshot.record["commit"])
    for table in map(read_json, sorted(TABLES.glob("*.json"))):
        row = next((row for row in table["rows"] if row["run"] == run.name and seed in row["seconds"]), None)
        if table["base"] == run.base and row and (row["seconds"][seed], row["commits"][seed]) == made_from:
            heads, lines = cells(table)
            line = lines[table["rows"].index(row)]
            found.append({"table": table, "cells": (heads, [line]), "steps": row["step"], "stand_in": stand_in(table)})
    return found
