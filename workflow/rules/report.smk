# Tables beside the paper's, and one page over the tables that were asked for.
def requested_tables():
    """Tables behind the targets of this call; the demo when none is named."""
    targets = [str(target) for target in workflow.dag_settings.targets]
    names = [name for name in TABLES if name in targets or f"results/tables/{name}.md" in targets]
    return (DIGITS if "digits" in targets else []) or names or ["demo"]


rule table:
    input:
        outdated("results/tables/{table}.json"),
        lambda w: EXPERIMENT.measured(w.table),
    output:
        multiext("results/tables/{table}", ".json", *(f".{suffix}" for suffix in BESIDE)),
    localrule: True
    message:
        "table {wildcards.table}"
    shell:
        "python -m eval.report.tables {wildcards.table}"


def outdated_report(w):
    """As `outdated`; which tables the page should show is known only once targets are."""
    page = Artefact(["results/report.html"], None, [f"results/tables/{name}.json" for name in requested_tables()])
    OUTDATED.review([page])
    return outdated("results/report.html")(w)


rule report:
    input:
        outdated_report,
        tables=lambda w: expand("results/tables/{table}.json", table=requested_tables()),
    output:
        "results/report.html",
    localrule: True
    message:
        "report {output}"
    shell:
        "python -m eval.report.page {input.tables} --out {output}"
