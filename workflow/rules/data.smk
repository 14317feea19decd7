# Real data, detectors and their reference statistics, teachers, pairs.
rule real_data:
    output:
        "data/real/{data}/manifest.json",
    params:
        config=lambda w: as_json(DATA[w.data]),
    threads: config["real_data"]["threads"]
    resources:
        **hardware("real_data"),
    message:
        "real data {wildcards.data}"
    shell:
        "python -m dmd2.data --config {params.config:q} {output}"


rule classifier:
    input:
        lambda w: f"data/real/{w.classifier.removesuffix('-classifier')}/manifest.json",
    output:
        "data/weights/{classifier}/manifest.json",
    threads: config["classifier"]["threads"]
    resources:
        **hardware("classifier"),
    message:
        "detector {wildcards.classifier}"
    shell:
        "python -m eval.detectors train {wildcards.classifier} {input} {output} --threads {threads}"


rule reference:
    input:
        real="data/real/{data}/manifest.json",
        detector="data/weights/{classifier}/manifest.json",
    output:
        "data/refs/{data}-{classifier}/manifest.json",
    threads: config["reference"]["threads"]
    resources:
        **hardware("reference"),
    message:
        "reference statistics of {wildcards.data} under {wildcards.classifier}"
    shell:
        "python -m eval.detectors reference {wildcards.classifier} {input.real} {output} --threads {threads}"


rule teacher:
    input:
        lambda w: real_manifest(TEACHERS[w.teacher]) if TEACHERS[w.teacher].teacher.train else [],
    output:
        "data/teachers/{teacher}/manifest.json",
    params:
        data=lambda w: as_json(TEACHERS[w.teacher].data),
        teacher=lambda w: as_json(TEACHERS[w.teacher].teacher),
    threads: config["teacher"]["threads"]
    resources:
        **hardware("teacher"),
    message:
        "teacher {wildcards.teacher}"
    shell:
        "python -m dmd2.teachers --data {params.data:q} --teacher {params.teacher:q}"
        " --real {input:q} --threads {threads} {output}"


rule pairs_shard:
    input:
        lambda w: teacher_manifest(PAIR_SETS[w.pairs]),
    output:
        "data/pairs/{pairs}/shard-{shard}.json",
    params:
        config=lambda w: as_json(PAIR_SETS[w.pairs].training()),
    threads: config["pairs"]["threads"]
    resources:
        **hardware("pairs"),
    message:
        "pairs {wildcards.pairs}, shard {wildcards.shard}"
    shell:
        "python -m dmd2.pairs shard {input} {wildcards.shard} {output} --config {params.config:q} --threads {threads}"


rule pairs:
    input:
        lambda w: expand(
            "data/pairs/{pairs}/shard-{shard:05d}.json",
            pairs=w.pairs,
            shard=range(PAIR_SETS[w.pairs].regression.pairs.shards),
        ),
    output:
        "data/pairs/{pairs}/manifest.json",
    localrule: True
    message:
        "pairs {wildcards.pairs}"
    shell:
        "python -m dmd2.pairs join {output} {input}"
