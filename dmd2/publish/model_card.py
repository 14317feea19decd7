"""The model card of an exported student: what it is, how to sample it, what was measured, whose licence it carries."""

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dmd2.core.files import read_json
from dmd2.experiment.config import TrainConfig, digest
from dmd2.publish.table_text import cells, label, number, stand_in
from dmd2.publish.template import TEMPLATES, template
from dmd2.training.snapshot import Snapshot

TABLES = Path("results/tables")
LICENCES = (  # identifiers a model card's `license` may have; anything else is `other` with a name
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++", "creativeml-openrail-m",
)  # fmt: skip
ORIGINS = {"sklearn-digits": "the handwritten digits that scikit-learn ships (UCI, 1,797 images of 8x8)"}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def model_card(
    snapshot: Snapshot, sampling: dict[str, Any], script: str, checked: dict[str, Any] | None, licence: str | None
) -> ModelCard:
    """The card with its metadata.

    Args:
        snapshot: that is exported.
        sampling: what the sampling script was rendered from (see `dmd2.publish.diffusers_folder.sampling_of`).
        script: the sampling script.
        checked: how its images compared with ours (see `dmd2.publish.diffusers_folder.check`), or None.
        licence: what the user said about the teacher's.
    """
    found = (snapshot.measured or {"estimates": {}})["estimates"]
    sampling = {**sampling, "count": COUNTS.get(len(sampling["times"]), str(len(sampling["times"])))}
    card = template(TEMPLATES / "card.md.j2", label=label, number=number)
    body = card.render(
        sampling,
        snapshot=snapshot,
        record=snapshot.record,
        digest=digest(snapshot.cfg),
        origin=ORIGINS.get(snapshot.cfg.data.source.kind),
        guidance=told_guidance(snapshot.cfg),
        script=script,
        checked=checked,
        measured=found,
        tables=table_rows(snapshot),
        licence=licence,
        config=yaml.safe_dump(snapshot.record["config"], sort_keys=False),
    )
    values = {metric: e["value"] for metric, e in found.items() if math.isfinite(e["value"]) and metric != "brightness"}
    return ModelCard(f"---\n{metadata(snapshot, sampling, values, licence).to_yaml()}\n---\n\n{body}")


def told_guidance(cfg: TrainConfig) -> str:
    """The teacher's guidance scale in training, or the range that it was drawn from."""
    if cfg.dm.guidance is None:
        return f"{cfg.teacher.guidance:g}"
    low, high = cfg.dm.guidance
    return f"{low:g} to {high:g}, drawn for each image,"


def metadata(
    snapshot: Snapshot, sampling: dict[str, Any], values: dict[str, float], licence: str | None
) -> ModelCardData:
    """The card's YAML head; measured values become its model index."""
    task = "text-to-image" if sampling["text"] else "unconditional-image-generation"
    known = licence is None or licence.lower() in LICENCES
    data, detector = snapshot.cfg.data.name, (snapshot.metrics or {}).get("protocol", {}).get("detector")
    long_names = {"fd": f"Fréchet distance in the features of {detector} (FD)"}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_value=value,
            metric_name=long_names.get(metric, f"{label(metric)} ({detector})"),
        )
        for metric, value in values.items()
    ]
    by = "class-" if sampling["labelled"] else "text-" if sampling["text"] else "un"
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=("unknown" if licence is None else licence.lower()) if known else "other",
        license_name=None if known else licence,
        tags=["diffusion", "distillation", "dmd2", f"{sampling['count']}-step", f"{by}conditional"]
        + ["lora"] * bool(sampling["lora"]),
        model_name=str(snapshot.run).replace("/", "-") if results else None,
        eval_results=results or None,
    )


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
