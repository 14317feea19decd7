# Which configs a wildcard stands for. Wildcards accept only what the tables name.
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

from dmd2.core.errors import terminal_of
from dmd2.core.files import digest_of, read_json
from dmd2.experiment.run_inputs import (
    Inputs,
    measured_with,
    pair_inputs,
    pipeline_manifest,
    pipeline_settings,
    prompt_set,
    prompt_settings,
)
from dmd2.core.provenance import Artefact
from dmd2.core.run import RunId
from dmd2.experiment.yaml_file import read_yaml
from eval.detectors.weights import registry

CONFIGS = [*EXPERIMENT.bases.values(), *RUNS.values()]
DATA = {cfg.data.name: cfg.data for cfg in CONFIGS}


def shared(name, settings, made):
    """One config for each name that several may share: that with whose settings it was made here, or else the first.

    Guidance, and the data of a teacher brought along, may differ between them and are in the record.
    """
    found = {}
    for cfg in CONFIGS:
        if name(cfg) is not None:
            found.setdefault(name(cfg), []).append(cfg)
    return {
        of: next((c for c in some if recorded_in(made(of)) == digest_of(settings(c))), some[0])
        for of, some in found.items()
    }


def recorded_in(path):
    """Digest of the settings with which an artefact was made, None where there is none."""
    try:
        return read_json(Path(path))["made_from"]["config"]
    except (KeyError, TypeError, UserError):
        return None


def pairs_settings(cfg):
    """What pairs depend on, and nothing else of the rows that use them."""
    return cfg.settings(include={"data": True, "teacher": True, "regression": {"pairs"}})


def teacher_settings(cfg):
    return [cfg.data.settings(), cfg.teacher.settings()]


TEACHERS = shared(lambda cfg: cfg.teacher.name, teacher_settings, "data/teachers/{}/manifest.json".format)
PAIR_SETS = shared(
    lambda cfg: cfg.pair_set if cfg.needs_pairs else None, pairs_settings, "data/pairs/{}/shard-00000.json".format
)
DETECTORS = {cfg.eval.detector for cfg in CONFIGS} | {cfg.eval.clip for cfg in CONFIGS if cfg.eval.clip}
# Moments by name: detector, reference and geometry.
STATISTICS = {cfg.eval.statistics: (cfg.eval.detector, cfg.eval.reference, cfg.eval.geometry) for cfg in CONFIGS}
STATISTICS |= {
    cfg.eval.patch_statistics: (cfg.eval.detector, cfg.eval.patch.reference, cfg.eval.patch.geometry)
    for cfg in CONFIGS
    if cfg.eval.patch
}
PIPELINES = {cfg.data.text.pipeline.name: cfg.data for cfg in CONFIGS if cfg.data.text}
# Encoded prompts by the name of their folder: the data section that says how, and the file.
PROMPT_SETS = {
    prompt_set(cfg.data, path): (cfg.data, path)
    for cfg in CONFIGS
    if cfg.data.text
    for path in (cfg.data.text.prompts, cfg.eval.prompts)
    if path
}


PUBLISHED = {name: entry for name, entry in registry().items() if entry.package is None}
# Every network with weights to be downloaded, and the detectors that use them: the first file stands for all.
WEIGHTS_OF = {
    detector: f"data/weights/{name}/{entry.files[0].file}"
    for name, entry in PUBLISHED.items()
    for detector in [name, *entry.detectors]
}


wildcard_constraints:
    network="|".join(PUBLISHED),
    weights=r"[^/]+\.(pt|pth|bin|safetensors)",
    data="|".join(DATA),
    pipeline="|".join(PIPELINES) or "none",
    prompts="|".join(map(re.escape, PROMPT_SETS)) or "none",
    teacher="|".join(TEACHERS),
    pairs="|".join(PAIR_SETS) or "none",
    detector="|".join(DETECTORS),
    statistics="|".join(map(re.escape, STATISTICS)),
    base="|".join(EXPERIMENT.bases),
    run="|".join({run for _, run in RUNS}),
    table="|".join(TABLES),
    sampler=r"\w+",
    part=r"\d+",
    seed=r"\d+",
    shard=r"\d{5}",


# What a stateless job's shell command starts with: the cluster file's setup commands and container, then Python.
PYTHON = CLUSTER.command()
# A job's messages go to its log, which is shown if the job fails. Its progress does not: that goes to the terminal of
# Snakemake, which rules open as descriptor 3 (`show` in dmd2/core/errors.py, which compares it with the variable).
os.environ.update(DMD2_TERMINAL=terminal_of(2) or "")


def hardware(kind):
    """What a kind of job asks a scheduler for."""
    return getattr(CLUSTER.jobs, kind).snakemake()


def threads_of(kind):
    return getattr(CLUSTER.jobs, kind).threads


def device_of(kind):
    """Where the networks of a kind of job run, as the cluster file says."""
    return getattr(CLUSTER.jobs, kind).device


# What trainings wait for comes before all of them (train.smk), since the longest of them may be the one that waits.
BEFORE_TRAINING = 1_000_000_000
KINDS = []


def artefact(*outputs, of, settings, inputs=lambda w: {}):
    """Input of a rule whose first output records what it was made from (dmd2/core/provenance.py).

    outputs: their patterns. of: wildcards of those that the tables could ask for. settings: what an output depends on
    besides its inputs, given its wildcards, as JSON values. inputs: files by name, or lists of files, given its wildcards.
    """
    KINDS.append((outputs, of, settings, inputs))

    def found(w):
        settle()
        changed = {"changed": CHANGED} if outputs[0].format(**dict(w.items())) in OUTDATED else {}
        return inputs(w) | changed

    return unpack(found)


def artefacts():
    """Every artefact that the tables could ask for, inputs before what is made from them: the order of the rules."""
    for outputs, of, settings, inputs in KINDS:
        for wildcards in of:
            w = SimpleNamespace(**wildcards)
            files = [file for value in inputs(w).values() for file in ([value] if isinstance(value, str) else value)]
            yield Artefact([output.format(**wildcards) for output in outputs], settings(w), files)


def as_json(section):
    """A config section on a job's command line."""
    return json.dumps(section.settings(), sort_keys=True)


def real_manifest(cfg):
    return f"data/real/{cfg.data.name}/manifest.json"


def teacher_manifest(cfg):
    return f"data/teachers/{cfg.teacher.name}/manifest.json"
