# Tables beside the paper's, and one page over the tables that were asked for.
def table_spec(w):
    """All of a table that its text shows, so that an edited paper number remakes the table and nothing else."""
    rows = [row.model_dump(mode="json") for row in EXPERIMENT.rows[w.table]]
    return json.dumps([TABLES[w.table].model_dump(mode="json"), rows], sort_keys=True)


def table_metrics(w):
    base, rows, seeds = TABLES[w.table].base, [row.run for row in EXPERIMENT.rows[w.table]], TABLES[w.table].seeds
    students = expand("results/runs/{base}/{run}/seed{seed}/metrics.json", base=base, run=rows, seed=seeds)
    return students + expand("results/teachers/{base}/{s}/metrics.json", base=base, s=TABLES[w.table].teachers)


def requested_tables():
    """Tables behind the targets of this call; the demo when none is named."""
    targets = [str(target) for target in workflow.dag_settings.targets]
    names = [name for name in TABLES if name in targets or f"results/tables/{name}.md" in targets]
    return (DIGITS if "digits" in targets else []) or names or ["demo"]


rule table:
    input:
        table_metrics,
    output:
        multiext("results/tables/{table}", ".md", ".csv", ".json"),
    params:
        spec=table_spec,
    localrule: True
    message:
        "table {wildcards.table}"
    shell:
        "python -m eval.tables {wildcards.table}"


rule report:
    input:
        lambda w: expand("results/tables/{table}.json", table=requested_tables()),
    output:
        "results/report.html",
    localrule: True
    message:
        "report {output}"
    shell:
        "python -m eval.report {input} --out {output}"
