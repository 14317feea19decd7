# Tables beside the paper's, and one page over the tables that were asked for.
def requested_tables():
    """Tables behind the targets of this call; the demo when none is named."""
    targets = [str(target) for target in workflow.dag_settings.targets]
    names = [name for name in TABLES if name in targets or f"results/tables/{name}.md" in targets]
    return (DIGITS if "digits" in targets else []) or names or ["demo"]


rule table:
    input:
        artefact(
            *(f"results/tables/{{table}}.{suffix}" for suffix in ("json", *BESIDE)),
            of=[{"table": name} for name in TABLES],
            settings=lambda w: EXPERIMENT.shown(w.table),
            inputs=lambda w: {"metrics": EXPERIMENT.measured(w.table)},
        ),
    output:
        multiext("results/tables/{table}", ".json", *(f".{suffix}" for suffix in BESIDE)),
    log:
        "logs/table/{table}.log",
    localrule: True
    message:
        "table {wildcards.table}"
    shell:
        "exec 3>&2 &> {log}; python -m eval.report.tables {wildcards.table}"


def report_inputs(w):
    """As `artefact`; which tables the page should show is known only once targets are."""
    tables = [f"results/tables/{name}.json" for name in requested_tables()]
    reason = outdated([Artefact(["results/report.html"], None, tables)])
    tell("out of date", reason)
    settle()
    return {"tables": tables} | ({"changed": CHANGED} if reason else {})


rule report:
    input:
        unpack(report_inputs),
    output:
        "results/report.html",
    log:
        "logs/report.log",
    localrule: True
    message:
        "report {output}"
    shell:
        "exec 3>&2 &> {log}; python -m eval.report.page {input.tables} --out {output}"
