# Metrics of every snapshot of a run, and of the teacher's samplers. Where eval.shards is above 1, that many jobs share the
# images and leave features beside the metrics; the last job then only joins them. They come before the next trainings, so
# that the first samples can be looked at while those go on.
def eval_inputs(cfg):
    return {name: str(path) for name, path in measured_with(cfg).items()}


def parts(cfg, folder):
    """Notes of the jobs that share the features of what is evaluated in `folder`."""
    shards = cfg.eval.shards
    return {"parts": [f"{folder}/features-{i}.json" for i in range(shards)]} if shards > 1 else {}


rule evaluate_part:
    input:
        unpack(lambda w: eval_inputs(RUNS[w.base, w.run])),
        train="results/runs/{base}/{run}/seed{seed}/train.json",
    output:
        temp("results/runs/{base}/{run}/seed{seed}/features-{part}.json"),
    log:
        "logs/evaluate_part/{base}/{run}/seed{seed}-part{part}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    params:
        python=PYTHON,
        device=device_of("evaluate"),
        config=lambda w: as_json(RUNS[w.base, w.run].measured()),
    message:
        "features {wildcards.base}/{wildcards.run}/seed{wildcards.seed}, part {wildcards.part}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.runs run {wildcards.base}/{wildcards.run}/seed{wildcards.seed} {output}"
        " --part {wildcards.part} --config {params.config:q} --threads {threads} --device {params.device}"


rule evaluate:
    input:
        artefact(
            "results/runs/{base}/{run}/seed{seed}/metrics.json",
            "results/runs/{base}/{run}/seed{seed}/grid.png",
            of=WANTED_RUNS,
            settings=lambda w: RUNS[w.base, w.run].measured().settings(),
            inputs=lambda w: {
                **eval_inputs(RUNS[w.base, w.run]),
                "train": f"results/runs/{w.base}/{w.run}/seed{w.seed}/train.json",
            },
        ),
        unpack(lambda w: parts(RUNS[w.base, w.run], f"results/runs/{w.base}/{w.run}/seed{w.seed}")),
    output:
        metrics="results/runs/{base}/{run}/seed{seed}/metrics.json",
        grid=report(
            "results/runs/{base}/{run}/seed{seed}/grid.png",
            caption="../report/samples.rst",
            category="samples",
            subcategory="{base}",
            labels={"row": "{run}", "seed": "{seed}"},
        ),
    log:
        "logs/evaluate/{base}/{run}/seed{seed}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    params:
        python=PYTHON,
        device=device_of("evaluate"),
        config=lambda w: as_json(RUNS[w.base, w.run].measured()),
    message:
        "evaluate {wildcards.base}/{wildcards.run}/seed{wildcards.seed}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.runs run {wildcards.base}/{wildcards.run}/seed{wildcards.seed} {output.metrics}"
        " --config {params.config:q} --threads {threads} --device {params.device}"


rule evaluate_teacher_part:
    input:
        unpack(lambda w: eval_inputs(EXPERIMENT.bases[w.base])),
    output:
        temp("results/teachers/{base}/{sampler}/features-{part}.json"),
    log:
        "logs/evaluate_teacher_part/{base}/{sampler}-part{part}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    params:
        python=PYTHON,
        device=device_of("evaluate"),
        config=lambda w: as_json(EXPERIMENT.bases[w.base].measured(w.sampler)),
    message:
        "features of the teacher of {wildcards.base}, sampler {wildcards.sampler}, part {wildcards.part}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.runs teacher {wildcards.sampler} {output}"
        " --part {wildcards.part} --config {params.config:q} --threads {threads} --device {params.device}"


rule evaluate_teacher:
    input:
        artefact(
            "results/teachers/{base}/{sampler}/metrics.json",
            "results/teachers/{base}/{sampler}/grid.png",
            of=[
                {"base": base, "sampler": sampler}
                for base, cfg in EXPERIMENT.bases.items()
                for sampler in cfg.eval.teacher_samplers
            ],
            settings=lambda w: EXPERIMENT.bases[w.base].measured(w.sampler).settings(),
            inputs=lambda w: eval_inputs(EXPERIMENT.bases[w.base]),
        ),
        unpack(lambda w: parts(EXPERIMENT.bases[w.base], f"results/teachers/{w.base}/{w.sampler}")),
    output:
        metrics="results/teachers/{base}/{sampler}/metrics.json",
        grid=report(
            "results/teachers/{base}/{sampler}/grid.png",
            caption="../report/samples.rst",
            category="samples",
            subcategory="{base}",
            labels={"row": "teacher-{sampler}", "seed": ""},
        ),
    log:
        "logs/evaluate_teacher/{base}/{sampler}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("evaluate")
    resources:
        **hardware("evaluate"),
    params:
        python=PYTHON,
        device=device_of("evaluate"),
        config=lambda w: as_json(EXPERIMENT.bases[w.base].measured(w.sampler)),
    message:
        "evaluate the teacher of {wildcards.base}, sampler {wildcards.sampler}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.runs teacher {wildcards.sampler} {output.metrics}"
        " --config {params.config:q} --threads {threads} --device {params.device}"
