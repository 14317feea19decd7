# Targets of each base for the stages of dvc.yaml (digits-data, digits-teacher, digits-runs), and what needs no versions.
def on_base(base, wanted):
    """Files that the runs of the tables on a base want, given each run's config."""
    configs = [cfg for (name, _), cfg in RUNS.items() if name == base]
    return sorted({path for cfg in [EXPERIMENT.bases[base], *configs] for path in wanted(cfg)})


def versioned():
    """Tables that dvc.yaml names, or all where there is none: a `dvc repro` after the demo trains no other table."""
    if not Path("dvc.yaml").exists():
        return list(TABLES)
    return [name for part in read_yaml(Path("dvc.yaml"))[0].get("vars", []) for name in part.get("tables", [])]


def measured_on(base):
    """Metrics of every run of the versioned tables on a base, and of the teacher's samplers that they show."""
    made = [name for name, table in TABLES.items() if table.base == base]
    left = [name for name in made if name not in versioned() and Path(f"results/tables/{name}.json").exists()]
    if left:
        tell("note", {", ".join(left): "made here, but not named in `tables` of dvc.yaml: DVC does not version them"})
    return sorted({path for name in made if name in versioned() for path in EXPERIMENT.measured(name)})


for base in EXPERIMENT.bases:

    rule:
        name:
            f"{base}-data"
        input:
            on_base(
                base,
                lambda cfg: [
                    real_manifest(cfg),
                    *(path for name, path in eval_inputs(cfg).items() if name != "teacher"),
                ],
            ),

    rule:
        name:
            f"{base}-teacher"
        input:
            on_base(base, lambda cfg: [teacher_manifest(cfg)]),
            on_base(base, lambda cfg: [f"data/pairs/{cfg.pair_set}/manifest.json"] if cfg.needs_pairs else []),

    rule:
        name:
            f"{base}-runs"
        input:
            lambda w, base=base: measured_on(base),


rule prune:
    log:
        "logs/prune.log",
    localrule: True
    message:
        "delete the checkpoints of finished trainings"
    shell:
        "python -m dmd2.publish.prune 2>&1 | tee {log}"
