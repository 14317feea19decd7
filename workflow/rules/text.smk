# What text runs need before data.smk's artefacts: pipelines, and sets of images and prompts encoded by them.
ruleorder: real_text > real_data


rule pipeline:
    input:
        artefact(
            "data/pipelines/{pipeline}/manifest.json",
            of=[{"pipeline": name} for name in PIPELINES],
            settings=lambda w: pipeline_settings(PIPELINES[w.pipeline]),
        ),
    output:
        "data/pipelines/{pipeline}/manifest.json",
    log:
        "logs/pipeline/{pipeline}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    params:
        python=PYTHON,
        device=device_of("encode"),
        config=lambda w: as_json(PIPELINES[w.pipeline]),
        settings=lambda w: json.dumps(pipeline_settings(PIPELINES[w.pipeline])),
    message:
        "pipeline {wildcards.pipeline}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.data pipeline --config {params.config:q} --threads {threads} --device {params.device} {output}"


TEXT_DATA = {name: data for name, data in DATA.items() if data.text}


def real_parts(data):
    return [f"{part:05d}" for part in range(data.text.jobs)]


rule real_part:
    input:
        artefact(
            "data/real/{data}/part-{shard}.json",
            of=[{"data": name, "shard": part} for name, data in TEXT_DATA.items() for part in real_parts(data)],
            settings=lambda w: DATA[w.data].settings(),
            inputs=lambda w: {"pipeline": str(pipeline_manifest(DATA[w.data]))},
        ),
    output:
        "data/real/{data}/part-{shard}.json",
    log:
        "logs/real_part/{data}/{shard}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    params:
        python=PYTHON,
        device=device_of("encode"),
        config=lambda w: as_json(DATA[w.data]),
    message:
        "encode {wildcards.data}, part {wildcards.shard}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.data part {input.pipeline} {wildcards.shard} {output} --config {params.config:q} --threads {threads} --device {params.device}"


rule real_text:
    input:
        artefact(
            "data/real/{data}/manifest.json",
            of=[{"data": name} for name in TEXT_DATA],
            settings=lambda w: DATA[w.data].settings(),
            inputs=lambda w: {"parts": [f"data/real/{w.data}/part-{part}.json" for part in real_parts(DATA[w.data])]},
        ),
    output:
        "data/real/{data}/manifest.json",
    log:
        "logs/real_text/{data}.log",
    wildcard_constraints:
        data="|".join(TEXT_DATA) or "none",
    priority: BEFORE_TRAINING
    localrule: True
    params:
        config=lambda w: as_json(DATA[w.data]),
    message:
        "real data {wildcards.data}"
    shell:
        "exec 3>&2 &> {log}; python -m dmd2.data join {output} {input.parts} --config {params.config:q}"


def prompts_inputs(w):
    """A source that is not there yet is left out: a dry run plans all the same, and the job says what to put where."""
    data, source = PROMPT_SETS[w.prompts]
    return {"pipeline": str(pipeline_manifest(data)), "source": source if Path(source).exists() else []}


rule prompts:
    input:
        artefact(
            "data/prompts/{prompts}/manifest.json",
            of=[{"prompts": name} for name in PROMPT_SETS],
            settings=lambda w: prompt_settings(PROMPT_SETS[w.prompts][0]),
            inputs=prompts_inputs,
        ),
    output:
        "data/prompts/{prompts}/manifest.json",
    log:
        "logs/prompts/{prompts}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    params:
        python=PYTHON,
        device=device_of("encode"),
        source=lambda w: PROMPT_SETS[w.prompts][1],
        config=lambda w: as_json(PROMPT_SETS[w.prompts][0]),
    message:
        "prompts {wildcards.prompts}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.data prompts {input.pipeline} {params.source:q} {output} --config {params.config:q} --threads {threads} --device {params.device}"
