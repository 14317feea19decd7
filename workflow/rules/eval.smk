# Metrics of every snapshot of a run, and of the teacher's samplers, each in one process.
def eval_inputs(cfg):
    return {
        "teacher": teacher_manifest(cfg),
        "detector": f"data/weights/{cfg.eval.detector}/manifest.json",
        "reference": f"data/refs/{cfg.eval.reference}-{cfg.eval.detector}/manifest.json",
    }


rule evaluate:
    input:
        unpack(lambda w: eval_inputs(RUNS[w.base, w.run])),
        train="results/runs/{base}/{run}/seed{seed}/train.json",
    output:
        metrics="results/runs/{base}/{run}/seed{seed}/metrics.json",
        grid="results/runs/{base}/{run}/seed{seed}/grid.png",
    params:
        config=lambda w: as_json(RUNS[w.base, w.run]),
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    message:
        "evaluate {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
    shell:
        "{PYTHON} -m eval.evaluate run {wildcards.base}/{wildcards.run}/seed{wildcards.seed} {output.metrics}"
        " --config {params.config:q} --threads {threads}"


rule evaluate_teacher:
    input:
        unpack(lambda w: eval_inputs(EXPERIMENT.bases[w.base])),
    output:
        metrics="results/teachers/{base}/{sampler}/metrics.json",
        grid="results/teachers/{base}/{sampler}/grid.png",
    params:
        config=lambda w: as_json(EXPERIMENT.bases[w.base]),
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    message:
        "evaluate the teacher of {wildcards.base}, sampler {wildcards.sampler}"
    shell:
        "{PYTHON} -m eval.evaluate teacher {wildcards.sampler} {output.metrics}"
        " --config {params.config:q} --threads {threads}"
