# Real data, detectors and their reference statistics, teachers, pairs.
rule real_data:
    output:
        "data/real/{data}/manifest.json",
    params:
        config=lambda w: as_json(DATA[w.data]),
    threads: threads_of("real_data")
    resources:
        **hardware("real_data"),
    message:
        "real data {wildcards.data}"
    shell:
        "{PYTHON} -m dmd2.data --config {params.config:q} {output}"


def detector_inputs(w):
    """A per-dataset classifier is trained on its data; any other detector is a file of the user's."""
    data = w.detector.removesuffix("-classifier")
    return {"real": f"data/real/{data}/manifest.json"} if data in DATA else {}


rule detector:
    input:
        unpack(detector_inputs),
    output:
        "data/weights/{detector}/manifest.json",
    params:
        real=lambda w, input: f"--real {input.real}" if input else "",
    threads: threads_of("detector")
    resources:
        **hardware("detector"),
    message:
        "detector {wildcards.detector}"
    shell:
        "{PYTHON} -m eval.detectors {wildcards.detector} {output} {params.real} --threads {threads}"


def reference_inputs(w):
    """Statistics of a data set are computed; any other reference is the user's npz (EDM's or clean-fid's format)."""
    real = {"real": f"data/real/{w.reference}/manifest.json"} if w.reference in DATA else {}
    return real | {"detector": f"data/weights/{w.detector}/manifest.json"}


rule reference:
    input:
        unpack(reference_inputs),
    output:
        "data/refs/{reference}-{detector}/manifest.json",
    params:
        source=lambda w, input: input.get("real", f"data/refs/{w.reference}.npz"),
    threads: threads_of("reference")
    resources:
        **hardware("reference"),
    message:
        "reference statistics {wildcards.reference} under {wildcards.detector}"
    shell:
        "{PYTHON} -m eval.reference {params.source} {output} --detector {wildcards.detector} --threads {threads}"


rule teacher:
    input:
        lambda w: real_manifest(TEACHERS[w.teacher]) if TEACHERS[w.teacher].teacher.train else [],
    output:
        "data/teachers/{teacher}/manifest.json",
    params:
        data=lambda w: as_json(TEACHERS[w.teacher].data),
        teacher=lambda w: as_json(TEACHERS[w.teacher].teacher),
        real=lambda w, input: f"--real {input}" if input else "",
    threads: threads_of("teacher")
    resources:
        **hardware("teacher"),
    message:
        "teacher {wildcards.teacher}"
    shell:
        "{PYTHON} -m dmd2.teachers --data {params.data:q} --teacher {params.teacher:q}"
        " {params.real} --threads {threads} {output}"


rule pairs_shard:
    input:
        lambda w: teacher_manifest(PAIR_SETS[w.pairs]),
    output:
        "data/pairs/{pairs}/shard-{shard}.json",
    params:
        config=lambda w: pairs_config(PAIR_SETS[w.pairs]),
    threads: threads_of("pairs")
    resources:
        **hardware("pairs"),
    message:
        "pairs {wildcards.pairs}, shard {wildcards.shard}"
    shell:
        "{PYTHON} -m dmd2.pairs shard {input} {wildcards.shard} {output} --config {params.config:q} --threads {threads}"


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
        "{PYTHON} -m dmd2.pairs join {output} {input}"
