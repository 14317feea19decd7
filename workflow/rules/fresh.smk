# What is out of date is decided here, by content and before the DAG exists: by the records in the artefacts (dmd2/core/provenance.py),
# never by clocks or by .snakemake, which a clone or a `dvc pull` does not bring along. The profiles therefore leave
# Snakemake the modification times only, which are put right for everything whose content says that it is up to date; a dry
# run tells them to Snakemake only.
import atexit
import sys
import tempfile
from types import SimpleNamespace

from snakemake_interface_storage_plugins.io import Mtime

from dmd2.core.retraining import trained_by_other_code
from dmd2.core.provenance import Artefact, Outdated

# Input of everything outdated: new, and of a content that no job has seen, since Snakemake compares checksums, too.
# Not in the workspace, where a dry run writes nothing.
CHANGED = ""
if workflow.is_main_process:
    with tempfile.NamedTemporaryFile("w", prefix="dmd2-changed-", delete=False) as file:
        CHANGED = file.name
        file.write(f"{time.time_ns()}\n")
    atexit.register(Path(CHANGED).unlink, missing_ok=True)


def artefacts():
    """Everything the tables could ask for, inputs before what is made from them."""
    for name, data in PIPELINES.items():
        yield Artefact([f"data/pipelines/{name}/manifest.json"], pipeline_settings(data), [])
    for name, (data, path) in PROMPT_SETS.items():
        inputs = [str(pipeline_manifest(data)), path]
        yield Artefact([f"data/prompts/{name}/manifest.json"], prompt_settings(data), inputs)
    for name, data in DATA.items():
        parts = real_parts(data) if data.text else []
        for part in parts:
            yield Artefact([part], json.loads(as_json(data)), [str(pipeline_manifest(data))])
        yield Artefact([f"data/real/{name}/manifest.json"], json.loads(as_json(data)), parts)
    for name in DETECTORS:
        real = detector_inputs(SimpleNamespace(detector=name)).get("real")
        yield Artefact([f"data/weights/{name}/manifest.json"], name, [real] if real else [])
    for name, spec in STATISTICS.items():
        inputs = reference_inputs(SimpleNamespace(statistics=name)).values()
        yield Artefact([f"data/refs/{name}/manifest.json"], [spec[0], spec[2]], list(inputs))
    for name, cfg in TEACHERS.items():
        sections = [json.loads(as_json(cfg.data)), json.loads(as_json(cfg.teacher))]
        yield Artefact([teacher_manifest(cfg)], sections, teacher_inputs(cfg))
    for name, cfg in PAIR_SETS.items():
        shards = pairs_shards(name)
        for shard in shards:
            inputs = [teacher_manifest(cfg), *map(str, pair_inputs(cfg.data))]
            yield Artefact([shard], json.loads(pairs_config(cfg)), inputs)
        yield Artefact([f"data/pairs/{name}/manifest.json"], None, shards)
    yield from runs()
    for base, cfg in EXPERIMENT.bases.items():
        for sampler in cfg.eval.teacher_samplers:
            folder, inputs = f"results/teachers/{base}/{sampler}", eval_inputs(cfg).values()
            yield Artefact([f"{folder}/metrics.json", f"{folder}/grid.png"], json.loads(as_json(cfg)), list(inputs))
    for name in TABLES:
        outputs = [f"results/tables/{name}.{suffix}" for suffix in ("json", *BESIDE)]
        yield Artefact(outputs, EXPERIMENT.shown(name), EXPERIMENT.measured(name))


def runs():
    """Trainings and their evaluations; a run whose weights another starts from comes first."""
    seeds = {}
    for name, table in TABLES.items():
        for row in EXPERIMENT.rows[name]:
            seeds.setdefault((table.base, row.run), set()).update(table.seeds)
    for base, run in sorted(RUNS, key=lambda key: starts_before(*key)):
        cfg = RUNS[base, run]
        for seed in seeds[base, run]:
            w, folder = SimpleNamespace(base=base, run=run, seed=seed), f"results/runs/{base}/{run}/seed{seed}"
            training = json.loads(as_json(cfg.training()))
            yield Artefact([f"{folder}/train.json"], training, train_inputs(w))
            inputs = [*eval_inputs(cfg).values(), f"{folder}/train.json"]
            yield Artefact([f"{folder}/metrics.json", f"{folder}/grid.png"], json.loads(as_json(cfg)), inputs)


def starts_before(base, run):
    """How many trainings a run's weights have behind them."""
    origin = RUNS[base, run].train.init_from
    return 0 if origin is None else 1 + starts_before(base, origin)


def other_code():
    """Trainings that are up to date but were done by other code, by train.json, with the modules that changed."""
    paths = [artefact.outputs[0] for artefact in runs() if artefact.outputs[0].endswith("/train.json")]
    told = {path: trained_by_other_code(Path(path)) for path in paths if path not in OUTDATED.reasons}
    return {path: text for path, text in told.items() if text}


SETTLED = {}


def settle():
    """Tell Snakemake, while it builds the DAG, that what is up to date is younger than its inputs.

    Only a run writes the times down (its jobs of Slurm look at the files); whatever only plans writes nothing.
    """
    if len(SETTLED) == len(OUTDATED.times):
        return
    workflow.iocache.mtime.update({path: Mtime(local=moment / 1e9) for path, moment in OUTDATED.times.items()})
    SETTLED.update(OUTDATED.times)
    if workflow.executor_plugin is not None and not workflow.dryrun:
        try:
            OUTDATED.date()
        except UserError as error:
            raise WorkflowError(str(error)) from None


OUTDATED = Outdated()
if workflow.is_main_process: # jobs of Slurm read this file again and are told what to do
    OUTDATED.review(artefacts())
    OUTDATED.not_in_the_future(WEIGHTS_OF.values())
    OTHER_CODE = other_code()
    if CHANGED_CODE == "retrain":
        OUTDATED.reasons |= OTHER_CODE
    else:
        for line in Outdated(OTHER_CODE).told():
            print(f"note: {line}", file=sys.stderr)
    for line in OUTDATED.told():
        print(f"out of date: {line}", file=sys.stderr)
