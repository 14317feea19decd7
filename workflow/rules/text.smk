# What text runs need before data.smk's artefacts: pipelines, and sets of images and prompts encoded by them.
ruleorder: real_text > real_data


rule pipeline:
    input:
        outdated("data/pipelines/{pipeline}/manifest.json"),
    output:
        "data/pipelines/{pipeline}/manifest.json",
    params:
        device=device_of("encode"),
        config=lambda w: as_json(PIPELINES[w.pipeline]),
        settings=lambda w: json.dumps(pipeline_settings(PIPELINES[w.pipeline])),
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    message:
        "pipeline {wildcards.pipeline}"
    shell:
        "{PYTHON} -m dmd2.data.make_pipeline --config {params.config:q} --threads {threads} --device {params.device} {output}"


def real_parts(data):
    return [f"data/real/{data.name}/part-{part:05d}.json" for part in range(data.text.jobs)]


rule real_part:
    input:
        outdated("data/real/{data}/part-{shard}.json"),
        pipeline=lambda w: str(pipeline_manifest(DATA[w.data])),
    output:
        "data/real/{data}/part-{shard}.json",
    params:
        device=device_of("encode"),
        config=lambda w: as_json(DATA[w.data]),
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    message:
        "encode {wildcards.data}, part {wildcards.shard}"
    shell:
        "{PYTHON} -m dmd2.data.encode part {input.pipeline} {wildcards.shard} {output} --config {params.config:q} --threads {threads} --device {params.device}"


rule real_text:
    input:
        outdated("data/real/{data}/manifest.json"),
        parts=lambda w: real_parts(DATA[w.data]),
    output:
        "data/real/{data}/manifest.json",
    params:
        config=lambda w: as_json(DATA[w.data]),
    wildcard_constraints:
        data="|".join(name for name, data in DATA.items() if data.text) or "none",
    localrule: True
    message:
        "real data {wildcards.data}"
    shell:
        "python -m dmd2.data.encode join {output} {input.parts} --config {params.config:q}"


rule prompts:
    input:
        outdated("data/prompts/{prompts}/manifest.json"),
        pipeline=lambda w: str(pipeline_manifest(PROMPT_SETS[w.prompts][0])),
        # Where it is not there yet, a dry run plans all the same, and the job says in a sentence what to put where.
        source=lambda w: PROMPT_SETS[w.prompts][1] if Path(PROMPT_SETS[w.prompts][1]).exists() else [],
    output:
        "data/prompts/{prompts}/manifest.json",
    params:
        device=device_of("encode"),
        source=lambda w: PROMPT_SETS[w.prompts][1],
        config=lambda w: as_json(PROMPT_SETS[w.prompts][0]),
    threads: threads_of("encode")
    resources:
        **hardware("encode"),
    message:
        "prompts {wildcards.prompts}"
    shell:
        "{PYTHON} -m dmd2.data.encode prompts {input.pipeline} {params.source:q} {output} --config {params.config:q} --threads {threads} --device {params.device}"
