# One training per row and seed; a released student is only converted. Hardware is no param: another micro-batch or device must not restart a finished run.
# Checkpoints are never declared outputs: Snakemake deletes those of a failed job.
from importlib.metadata import version


def train_inputs(w):
    return {"read": [str(path) for path in Inputs.of(RunId(w.base, w.run, w.seed), RUNS[w.base, w.run]).paths()]}


def starts_before(base, run):
    """How many trainings a run's weights have behind them."""
    origin = RUNS[base, run].train.init_from
    return 0 if origin is None else 1 + starts_before(base, origin)


def wanted_runs():
    """Wildcards of every run of the tables; one that another starts from comes first."""
    seeds = {}
    for name, table in TABLES.items():
        for row in EXPERIMENT.rows[name]:
            seeds.setdefault((table.base, row.run), set()).update(table.seeds)
    ordered = sorted(RUNS, key=lambda key: starts_before(*key))
    return [{"base": base, "run": run, "seed": seed} for base, run in ordered for seed in seeds[base, run]]


WANTED_RUNS = wanted_runs()


def lpips_weights(w):
    """Weights of the regression's distance: fetched before a training, no part of what it is made from."""
    cfg = RUNS[w.base, w.run]
    return [WEIGHTS_OF["lpips-vgg16"]] if cfg.needs_pairs and cfg.regression.distance == "lpips" else []


def compiled_code(w):
    """What is compiled before the trainings of a base begin, if the cluster compiles and the run is to be trained."""
    if CLUSTER.training.compiled == "none" or Path(f"results/runs/{w.base}/{w.run}/seed{w.seed}/train.json").exists():
        return []
    return [COMPILED.format(base=w.base)] if RUNS[w.base, w.run].train.released is None else []


def warmed(w):
    """The run whose passes are compiled for a base: the first that is trained."""
    trained = (run for run in WANTED_RUNS if run["base"] == w.base and not RUNS[w.base, run["run"]].train.released)
    run = next(trained)
    return RunId(w.base, run["run"], run["seed"])


# Code is for one version of PyTorch, for blocks or networks, and for the images of a pass.
COMPILED = (
    f"{CLUSTER.training.compile_cache}/{{base}}-{CLUSTER.training.compiled}-{CLUSTER.training.micro_batch}"
    f"-torch{version('torch')}.json"
)


rule compiled:
    input:
        # No code is out of date because other weights or images lie there.
        ancient(lambda w: [str(path) for path in Inputs.of(warmed(w), RUNS[w.base, warmed(w).name]).paths()]),
    output:
        COMPILED,
    log:
        "logs/compiled/{base}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("train")
    resources:
        **hardware("train"),
    params:
        python=PYTHON,
        cluster=CLUSTER_NAME,
        run=lambda w: warmed(w),
        config=lambda w: as_json(RUNS[w.base, warmed(w).name].training()),
    message:
        "compile {params.run}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.launch warm {params.run} {output} --config {params.config:q} --cluster {params.cluster}"


def work(cfg):
    """Priority of a training: about its length in critic turns, so that the longest begins first and none ends alone."""
    student = cfg.critic.student_updates(cfg.train.steps)
    return cfg.train.steps + student * (2 if cfg.needs_pairs else 1)


rule train:
    input:
        artefact(
            "results/runs/{base}/{run}/seed{seed}/train.json",
            of=WANTED_RUNS,
            settings=lambda w: RUNS[w.base, w.run].training().settings(),
            inputs=train_inputs,
        ),
        lpips_weights,
        compiled_code,
    output:
        "results/runs/{base}/{run}/seed{seed}/train.json",
    log:
        "logs/train/{base}/{run}/seed{seed}.log",
    priority: lambda w: work(RUNS[w.base, w.run])
    # On Slurm this rule only waits for the job that it submits or finds; a retry would undo a `scancel`.
    retries: 0
    localrule: True
    threads: threads_of("train")
    resources:
        **hardware("train"),
    params:
        cluster=CLUSTER_NAME,
        changed_code=CHANGED_CODE,
        config=lambda w: as_json(RUNS[w.base, w.run].training()),
    message:
        "train {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
    shell:
        "exec 3>&2 &> {log}; exec python -m dmd2.launch train {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
        " --config {params.config:q} --cluster {params.cluster} --changed-code {params.changed_code}"
