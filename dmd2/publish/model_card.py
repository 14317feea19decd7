"""The model card of an exported student: what it is, how to sample it, what was measured, whose licence it carries."""

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dmd2.core.files import read_json
from dmd2.experiment.config import TrainConfig, digest
from dmd2.publish.table_text import excerpt, label
from dmd2.publish.template import template
from dmd2.training.snapshot import Snapshot

TEMPLATES, TABLES = Path(__file__).with_name("templates"), Path("results/tables")
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
    row = f"{snapshot.run.base}/{snapshot.run.name}"
    measured = measured_lines(snapshot)
    body = template(TEMPLATES / "card.md.j2").render({
        **sampling, "title": f"{_steps(sampling).capitalize()}-step student {snapshot.run}", "row": row,
        "about": about(snapshot.cfg, sampling), "calls": f"{_steps(sampling)} time{'s' * (len(sampling['times']) > 1)}",
        "steps": f"{_steps(sampling)} step{'s' * (len(sampling['times']) > 1)}",
        "levels": ", ".join(f"{t:.6g}" for t in sampling["times"]), "script": script, "checked": checked,
        "measured": measured, "protocol": protocol(snapshot) if measured else "", "tables": table_rows(snapshot),
        "without": _missing_parts(sampling), **_rank(snapshot.cfg),
        "unmeasured": "the run has no evaluation of this training" if snapshot.metrics is None else "not evaluated",
        "facts": facts(snapshot), "licence": licence_note(snapshot.cfg, licence),
        "config": yaml.safe_dump(snapshot.record["config"], sort_keys=False),
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


def _missing_parts(sampling: dict[str, Any]) -> str:
    if not sampling["text"]:
        return "no pipeline class of diffusers samples such a network"
    if sampling["pipeline"]:
        return "VAE and text encoders are the teacher's and not in this folder"
    return f"prompts are encoded by the workbench's pipeline `{sampling['encoder']}`, which is not in this folder"


def _rank(cfg: TrainConfig) -> dict[str, Any]:
    lora = cfg.generator.lora
    return {"rank": lora.rank, "alpha": f"{lora.alpha:g}"} if lora else {}


def _values(snapshot: Snapshot) -> dict[str, float]:
    estimates = snapshot.measured["estimates"] if snapshot.measured else {}
    return {metric: e["value"] for metric, e in estimates.items() if math.isfinite(e["value"])}


def _long_name(metric: str, snapshot: Snapshot) -> str:
    assert snapshot.metrics is not None
    detector = snapshot.metrics["protocol"]["detector"]
    if metric == "fd":
        return f"Fréchet distance in the features of {detector} (FD)"
    return f"{label(metric)} ({detector})"


def about(cfg: TrainConfig, sampling: dict[str, Any]) -> str:
    """What the model is, in a sentence or two."""
    data = cfg.data
    kind = f"class-conditional ({data.classes} classes)" if sampling["labelled"] else "text-conditional"
    what = "images" if sampling["pixels"] else "latents"
    return (
        f"A {kind} generator of {what} of {data.channels}x{data.resolution}x{data.resolution} that needs "
        f"{_steps(sampling)} network call{'s' if len(sampling['times']) > 1 else ''}. It was distilled from the "
        f"diffusion teacher `{cfg.teacher.name}` on the data `{data.name}` by the DMD2 workbench. Weights of the "
        f"student's losses: distribution matching {cfg.dm.weight:g}, GAN {cfg.gan.lambda_g:g}, regression "
        f"{cfg.regression.weight:g}."
    )


def measured_lines(snapshot: Snapshot) -> list[list[str]]:
    """Cells per metric: name, value, standard error, bias, interval, number of images."""
    if snapshot.measured is None:
        return []
    lines = []
    for metric, e in snapshot.measured["estimates"].items():
        interval = "–" if e["low"] is None else f"[{e['low']:.4g}, {e['high']:.4g}]"
        numbers = ["–" if e[key] is None else f"{e[key]:.4g}" for key in ("value", "se", "bias")]
        lines.append([label(metric), *numbers, interval, str(e["n"])])
    return lines


def protocol(snapshot: Snapshot) -> str:
    """How the numbers were made, and what they are not."""
    assert snapshot.metrics is not None
    how = snapshot.metrics["protocol"]
    text = (
        f"Step {snapshot.step} of {snapshot.record['steps']}, {snapshot.selection}; labels {how['labels']}, rounding "
        f"{how['rounding']}; detector {how['detector']}; reference {how['reference']}; evaluated at commit "
        f"{snapshot.metrics['eval_commit']}. The intervals cover the finite number of images of this one training, "
        "with the reference taken as fixed; another training seed can differ by more."
    )
    if "fd" in _values(snapshot):
        text += " FD is the Fréchet distance in this detector's features: it is not FID, do not compare it with one."
    return text


def table_rows(snapshot: Snapshot) -> list[dict[str, str]]:
    """The run's row in each table of results/tables that was made from this very training, as Markdown."""
    found, run, seed = [], snapshot.run, str(snapshot.run.seed)
    made_from = (snapshot.record["seconds"], snapshot.record["commit"])
    for table in map(read_json, sorted(TABLES.glob("*.json"))):
        row = next((row for row in table["rows"] if row["run"] == run.name and seed in row["seconds"]), None)
        if table["base"] != run.base or row is None:
            continue
        if (row["seconds"][seed], row["commits"][seed]) == made_from:
            relation = _relation(row["step"], seed, snapshot.step)
            found.append({"title": table["title"], "text": excerpt(table, run.name), "relation": relation})
    return found


def _relation(steps: dict[str, int], seed: str, step: int) -> str:
    text = f"its seeds are {', '.join(steps)} and this student is seed {seed}"
    return text + (":" if steps[seed] == step else f", but at step {step} while the table takes step {steps[seed]}:")


def facts(snapshot: Snapshot) -> dict[str, str]:
    """Where the weights come from, as a table."""
    cfg, record = snapshot.cfg, snapshot.record
    teacher = "trained here" if cfg.teacher.train else "brought by the user"
    return {
        "run": f"`{snapshot.run}`",
        "config": f"digest `{digest(cfg)}`; with its inputs `{record['key']}`",
        "commit": f"`{record['commit']}`",
        "snapshot": f"step {snapshot.step} of {record['steps']} critic updates, "
                    f"{cfg.critic.student_updates(snapshot.step)} student updates; sha256 `{snapshot.entry['sha256']}`",
        "teacher": f"`{cfg.teacher.name}` ({cfg.teacher.parameterisation}, {teacher}), "
                   f"guidance {cfg.teacher.guidance:g}",
        "data": f"`{cfg.data.name}`: {ORIGINS.get(cfg.data.source.kind, cfg.data.source.kind)}",
        **({"trained": f"factors of rank {cfg.generator.lora.rank}, alpha {cfg.generator.lora.alpha:g} (LoRA), merged"}
           if cfg.generator.lora else {}),
        "time and machine": f"{record['seconds']} s, {record['processes']} process(es) on {record['device']}, "
                            f"{cfg.train.precision}, torch {record['torch']}",
    }  # fmt: skip


def licence_note(cfg: TrainConfig, licence: str | None) -> str:
    """What carries over to these weights, and who must say so."""
    teacher, data = cfg.teacher.name, cfg.data
    if cfg.teacher.train is not None:
        text = (
            f"The student started as a copy of the teacher `{teacher}`, which the workbench trained from scratch on "
            f"{ORIGINS.get(data.source.kind, f'the data `{data.name}`')}: no third party's weights are in it, but the "
            "terms of the data may apply."
        )
    else:
        text = (
            f"The student started as a copy of the weights of the teacher `{teacher}`, so the teacher's licence "
            "carries over to it."
        )
    if cfg.train.init_from is not None:
        text += f" It was initialised from the run `{cfg.train.init_from}`, so what holds for that run holds here too."
    if licence is None:
        text += " **No licence has been stated: whoever publishes this folder must state one.**"
    else:
        text += f" Licence of the teacher, as stated by who exported this: {licence}."
    return f"{text} The licence of the workbench's code (Apache-2.0) does not extend to weights."
