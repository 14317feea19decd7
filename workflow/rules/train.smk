# One training per row and seed; a released student is only converted. Hardware is no param: another micro-batch or device must not restart a finished run.
# Checkpoints are never declared outputs: Snakemake deletes those of a failed job.
def train_inputs(w):
    cfg = RUNS[w.base, w.run]
    return [str(path) for path in Inputs.of(RunId(w.base, w.run, w.seed), cfg).paths()]


def lpips_weights(w):
    """Weights of the regression's distance: fetched before a training, no part of what it is made from."""
    cfg = RUNS[w.base, w.run]
    return [WEIGHTS_OF["lpips-vgg16"]] if cfg.needs_pairs and cfg.regression.distance == "lpips" else []


rule train:
    input:
        outdated("results/runs/{base}/{run}/seed{seed}/train.json"),
        train_inputs,
        lpips_weights,
    output:
        "results/runs/{base}/{run}/seed{seed}/train.json",
    params:
        config=lambda w: as_json(RUNS[w.base, w.run].training()),
    threads: threads_of("train")
    resources:
        **hardware("train"),
    # On Slurm this rule only waits for the job that it submits or finds; a retry would undo a `scancel`.
    localrule: True
    retries: 0
    message:
        "train {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
    shell:
        "exec python -m dmd2.launch train {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
        " --config {params.config:q} --cluster {CLUSTER_NAME} --changed-code {CHANGED_CODE}"
