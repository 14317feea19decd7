# Tables, a page of each, and the list of all tables that were made.
INDEX, METHODS = "results/report/index.html", "results/report/methods.html"


def requested_tables():
    """Tables behind the targets of this call; the demo when none is named."""
    targets = [str(target) for target in workflow.dag_settings.targets] or ["demo"]
    asked = [*(DIGITS if "digits" in targets else []), *targets]
    return [name for name in TABLES if name in asked or f"results/tables/{name}.md" in asked]


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


IN_REPORT = {"html": "page", "curves.svg": "curves", "training.svg": "training"}  # of Snakemake: files and captions


def in_report(start, suffix):
    """An output of the page, which `snakemake --report` shows if it is of a kind that browsers do."""
    path = f"{start}.{suffix}"
    if suffix not in IN_REPORT:
        return path
    what = IN_REPORT[suffix]
    return report(path, caption=f"../report/{what}.rst", category="{table}", labels={"what": what})


rule page:
    input:
        artefact(
            *(f"results/report/{{table}}.{suffix}" for suffix in PAGE),
            of=[{"table": name} for name in TABLES],
            settings=lambda w: None,
            inputs=lambda w: {"table": f"results/tables/{w.table}.json"},
        ),
    output:
        *(in_report("results/report/{table}", suffix) for suffix in PAGE),
    log:
        "logs/page/{table}.log",
    localrule: True
    message:
        "page {output[0]}"
    shell:
        "exec 3>&2 &> {log}; python -m eval.report.page {wildcards.table}"


def index_inputs(w):
    """As `artefact`: pages of the tables of this call. The others are listed as they are, however old."""
    asked = requested_tables()
    names = sorted({*asked, *(path.stem for path in Path("results/tables").glob("*.json"))})
    reason = outdated([Artefact([INDEX], names, [f"results/tables/{name}.json" for name in names])])
    tell("out of date", reason)
    settle()
    pages = [f"results/report/{name}.html" for name in asked]
    return {"pages": pages} | ({"changed": CHANGED} if reason else {})


rule index:
    input:
        unpack(index_inputs),
    output:
        INDEX,
        METHODS,
    log:
        "logs/index.log",
    localrule: True
    message:
        "list of tables {output}"
    shell:
        "exec 3>&2 &> {log}; python -m eval.report.index"
