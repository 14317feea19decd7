# Real data, detectors and their reference statistics, teachers, pairs.
rule real_data:
    input:
        artefact(
            "data/real/{data}/manifest.json",
            of=[{"data": name} for name, data in DATA.items() if not data.text],
            settings=lambda w: DATA[w.data].settings(),
        ),
    output:
        "data/real/{data}/manifest.json",
    log:
        "logs/real_data/{data}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("real_data")
    resources:
        **hardware("real_data"),
    params:
        python=PYTHON,
        config=lambda w: as_json(DATA[w.data]),
    message:
        "real data {wildcards.data}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.data real --config {params.config:q} {output}"


def detector_inputs(w):
    """A per-dataset classifier is trained on its data; any other detector has published weights, or ships with them."""
    data = w.detector.removesuffix("-classifier").removesuffix("-clip")
    return {"real": f"data/real/{data}/manifest.json"} if data in DATA else {}


# On the login node, which has internet where compute nodes have not. A file that you put there yourself is used as it is.
rule weights:
    output:
        "data/weights/{network}/{weights}",
    log:
        "logs/weights/{network}/{weights}.log",
    priority: BEFORE_TRAINING
    localrule: True
    message:
        "download the weights of {wildcards.network}"
    shell:
        "exec 3>&2 &> {log}; python -m eval.detectors.weights {wildcards.network} --folder data/weights"


rule detector:
    input:
        artefact(
            "data/weights/{detector}/manifest.json",
            of=[{"detector": name} for name in DETECTORS],
            settings=lambda w: w.detector,
            inputs=detector_inputs,
        ),
        # No part of the record: other weights in this place are refused by their checksum when they are loaded.
        lambda w: WEIGHTS_OF.get(w.detector, []),
    output:
        "data/weights/{detector}/manifest.json",
    log:
        "logs/detector/{detector}.log",
    threads: threads_of("detector")
    resources:
        **hardware("detector"),
    params:
        python=PYTHON,
        device=device_of("detector"),
        real=lambda w, input: f"--real {input.real}" if "real" in input.keys() else "",
    message:
        "detector {wildcards.detector}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.detectors detector {wildcards.detector} {output} {params.real} --threads {threads} --device {params.device}"


def reference_inputs(w):
    """Statistics of a data set are computed; any other reference is the user's npz (EDM's or clean-fid's format)."""
    detector, reference, _ = STATISTICS[w.statistics]
    real = {"real": f"data/real/{reference}/manifest.json"} if reference in DATA else {}
    return real | {"detector": f"data/weights/{detector}/manifest.json"}


rule reference:
    input:
        artefact(
            "data/refs/{statistics}/manifest.json",
            of=[{"statistics": name} for name in STATISTICS],
            settings=lambda w: [STATISTICS[w.statistics][0], STATISTICS[w.statistics][2]],
            inputs=reference_inputs,
        ),
    output:
        "data/refs/{statistics}/manifest.json",
    log:
        "logs/reference/{statistics}.log",
    threads: threads_of("reference")
    resources:
        **hardware("reference"),
    params:
        python=PYTHON,
        device=device_of("reference"),
        source=lambda w, input: input.get("real", f"data/refs/{STATISTICS[w.statistics][1]}.npz"),
        detector=lambda w: STATISTICS[w.statistics][0],
        geometry=lambda w: STATISTICS[w.statistics][2],
    message:
        "reference statistics {wildcards.statistics}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m eval.detectors reference {params.source} {output} --detector {params.detector}"
        " --geometry {params.geometry} --threads {threads} --device {params.device}"


def teacher_inputs(w):
    """The real set, for a teacher that is trained here."""
    cfg = TEACHERS[w.teacher]
    return {"real": real_manifest(cfg)} if cfg.teacher.train else {}


rule teacher:
    input:
        artefact(
            "data/teachers/{teacher}/manifest.json",
            of=[{"teacher": name} for name in TEACHERS],
            settings=lambda w: teacher_settings(TEACHERS[w.teacher]),
            inputs=teacher_inputs,
        ),
    output:
        "data/teachers/{teacher}/manifest.json",
    log:
        "logs/teacher/{teacher}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("teacher")
    resources:
        **hardware("teacher"),
    params:
        python=PYTHON,
        device=device_of("teacher"),
        deterministic="--deterministic" if CLUSTER.training.deterministic else "",
        data=lambda w: as_json(TEACHERS[w.teacher].data),
        teacher=lambda w: as_json(TEACHERS[w.teacher].teacher),
        real=lambda w, input: f"--real {input.real}" if "real" in input.keys() else "",
    message:
        "teacher {wildcards.teacher}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.training teacher --data {params.data:q} --teacher {params.teacher:q}"
        " {params.real} --threads {threads} --device {params.device} {params.deterministic} {output}"


def pairs_shards(name):
    return [f"{shard:05d}" for shard in range(PAIR_SETS[name].pairs.shards)]


rule pairs_shard:
    input:
        artefact(
            "data/pairs/{pairs}/shard-{shard}.json",
            of=[{"pairs": name, "shard": shard} for name in PAIR_SETS for shard in pairs_shards(name)],
            settings=lambda w: pairs_settings(PAIR_SETS[w.pairs]),
            inputs=lambda w: {
                "teacher": teacher_manifest(PAIR_SETS[w.pairs]),
                "conditions": list(map(str, pair_inputs(PAIR_SETS[w.pairs].data))),
            },
        ),
    output:
        "data/pairs/{pairs}/shard-{shard}.json",
    log:
        "logs/pairs_shard/{pairs}/{shard}.log",
    priority: BEFORE_TRAINING
    threads: threads_of("pairs")
    resources:
        **hardware("pairs"),
    params:
        python=PYTHON,
        device=device_of("pairs"),
        config=lambda w: json.dumps(pairs_settings(PAIR_SETS[w.pairs]), sort_keys=True),
    message:
        "pairs {wildcards.pairs}, shard {wildcards.shard}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.training pairs {input.teacher} {wildcards.shard} {output} --config {params.config:q} --threads {threads} --device {params.device}"


rule pairs:
    input:
        artefact(
            "data/pairs/{pairs}/manifest.json",
            of=[{"pairs": name} for name in PAIR_SETS],
            settings=lambda w: None,
            inputs=lambda w: {
                "shards": [f"data/pairs/{w.pairs}/shard-{shard}.json" for shard in pairs_shards(w.pairs)]
            },
        ),
    output:
        "data/pairs/{pairs}/manifest.json",
    log:
        "logs/pairs/{pairs}.log",
    priority: BEFORE_TRAINING
    localrule: True
    params:
        python=PYTHON,
    message:
        "pairs {wildcards.pairs}"
    shell:
        "exec 3>&2 &> {log}; {params.python} -m dmd2.training join {output} {input.shards}"
