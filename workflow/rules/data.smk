# Real data, detectors and their reference statistics, teachers, pairs.
rule real_data:
    input:
        outdated("data/real/{data}/manifest.json"),
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
        "{PYTHON} -m dmd2.data.sets --config {params.config:q} {output}"


def detector_inputs(w):
    """A per-dataset classifier is trained on its data; any other detector has published weights, or ships with them."""
    data = w.detector.removesuffix("-classifier").removesuffix("-clip")
    if data in DATA:
        return {"real": f"data/real/{data}/manifest.json"}
    return {"weights": WEIGHTS_OF[w.detector]} if w.detector in WEIGHTS_OF else {}


# On the login node, which has internet where compute nodes have not. A file that you put there yourself is used as it is.
rule weights:
    output:
        "data/weights/{network}/{weights}",
    localrule: True
    message:
        "download the weights of {wildcards.network}"
    shell:
        "python -m eval.detectors.weights {wildcards.network}"


rule detector:
    input:
        outdated("data/weights/{detector}/manifest.json"),
        unpack(detector_inputs),
    output:
        "data/weights/{detector}/manifest.json",
    params:
        device=device_of("detector"),
        real=lambda w, input: f"--real {input.real}" if "real" in input.keys() else "",
    threads: threads_of("detector")
    resources:
        **hardware("detector"),
    message:
        "detector {wildcards.detector}"
    shell:
        "{PYTHON} -m eval.detectors.detectors {wildcards.detector} {output} {params.real} --threads {threads} --device {params.device}"


def reference_inputs(w):
    """Statistics of a data set are computed; any other reference is the user's npz (EDM's or clean-fid's format)."""
    detector, reference, _ = STATISTICS[w.statistics]
    real = {"real": f"data/real/{reference}/manifest.json"} if reference in DATA else {}
    return real | {"detector": f"data/weights/{detector}/manifest.json"}


rule reference:
    input:
        outdated("data/refs/{statistics}/manifest.json"),
        unpack(reference_inputs),
    output:
        "data/refs/{statistics}/manifest.json",
    params:
        device=device_of("reference"),
        source=lambda w, input: input.get("real", f"data/refs/{STATISTICS[w.statistics][1]}.npz"),
        detector=lambda w: STATISTICS[w.statistics][0],
        geometry=lambda w: STATISTICS[w.statistics][2],
    threads: threads_of("reference")
    resources:
        **hardware("reference"),
    message:
        "reference statistics {wildcards.statistics}"
    shell:
        "{PYTHON} -m eval.detectors.reference {params.source} {output} --detector {params.detector}"
        " --geometry {params.geometry} --threads {threads} --device {params.device}"


def teacher_inputs(cfg):
    """What a teacher trained here is made from; of text, the pipeline is part of the real set."""
    return [real_manifest(cfg)] if cfg.teacher.train else []


rule teacher:
    input:
        outdated("data/teachers/{teacher}/manifest.json"),
        lambda w: teacher_inputs(TEACHERS[w.teacher]),
    output:
        "data/teachers/{teacher}/manifest.json",
    params:
        device=device_of("teacher"),
        deterministic="--deterministic" if CLUSTER.training.deterministic else "",
        data=lambda w: as_json(TEACHERS[w.teacher].data),
        teacher=lambda w: as_json(TEACHERS[w.teacher].teacher),
        real=lambda w: f"--real {real_manifest(TEACHERS[w.teacher])}" if TEACHERS[w.teacher].teacher.train else "",
    threads: threads_of("teacher")
    resources:
        **hardware("teacher"),
    message:
        "teacher {wildcards.teacher}"
    shell:
        "{PYTHON} -m dmd2.training.make_teacher --data {params.data:q} --teacher {params.teacher:q}"
        " {params.real} --threads {threads} --device {params.device} {params.deterministic} {output}"


def pairs_shards(name):
    shards = range(PAIR_SETS[name].regression.pairs.shards)
    return [f"data/pairs/{name}/shard-{shard:05d}.json" for shard in shards]


rule pairs_shard:
    input:
        outdated("data/pairs/{pairs}/shard-{shard}.json"),
        lambda w: map(str, pair_inputs(PAIR_SETS[w.pairs].data)),
        teacher=lambda w: teacher_manifest(PAIR_SETS[w.pairs]),
    output:
        "data/pairs/{pairs}/shard-{shard}.json",
    params:
        device=device_of("pairs"),
        config=lambda w: pairs_config(PAIR_SETS[w.pairs]),
    threads: threads_of("pairs")
    resources:
        **hardware("pairs"),
    message:
        "pairs {wildcards.pairs}, shard {wildcards.shard}"
    shell:
        "{PYTHON} -m dmd2.training.pairs shard {input.teacher} {wildcards.shard} {output} --config {params.config:q} --threads {threads} --device {params.device}"


rule pairs:
    input:
        outdated("data/pairs/{pairs}/manifest.json"),
        shards=lambda w: pairs_shards(w.pairs),
    output:
        "data/pairs/{pairs}/manifest.json",
    localrule: True
    message:
        "pairs {wildcards.pairs}"
    shell:
        "{PYTHON} -m dmd2.training.pairs join {output} {input.shards}"
