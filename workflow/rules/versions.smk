# Targets of each base for the stages of dvc.yaml (digits-data, digits-teacher, digits-runs), and what needs no versions.
def on_base(base, wanted):
    """Files that the runs of the tables on a base want, given each run's config."""
    configs = [cfg for (name, _), cfg in RUNS.items() if name == base]
    return sorted({path for cfg in [EXPERIMENT.bases[base], *configs] for path in wanted(cfg)})


def versioned(base):
    """Tables on a base that dvc.yaml names, or all if it names none: a `dvc repro` after the demo trains no other table."""
    of_base = [name for name, table in TABLES.items() if table.base == base]
    parts = read_yaml(Path("dvc.yaml"))[0].get("vars") or [] if Path("dvc.yaml").exists() else []
    named = [part.get("tables") or [] for part in parts if isinstance(part, dict)]
    return [name for names in named for name in names if name in of_base] or of_base


def measured_on(base):
    """Metrics of every run of the versioned tables on a base, and of the teacher's samplers that they show."""
    names = versioned(base)
    others = [name for name, table in TABLES.items() if table.base == base and name not in names]
    if left := [name for name in others if Path(f"results/tables/{name}.json").exists()]:
        tell("note", {", ".join(left): "made here, but not named in `tables` of dvc.yaml: DVC does not version them"})
    return sorted({path for name in names for path in EXPERIMENT.measured(name)})


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
