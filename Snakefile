# The DAG of every table: data -> teacher -> pairs -> one training per row and seed -> metrics -> table -> report.
# Rows come from workflow/tables/*.yaml, complete configs from workflow/base/*.yaml; both are validated before the DAG exists.
from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from dmd2.experiment.tables import BESIDE, load_experiment
from dmd2.experiment.cluster import load_cluster
from dmd2.core.errors import UserError
from dmd2.core.slurm_queue import slurm

min_version("9.27")  # priorities that are functions

CLUSTER_NAME = config.get("cluster", "local")
# Of trainings done by other code than the present: `warn` tells of them, `retrain` makes them out of date.
CHANGED_CODE = config.get("changed_code", "warn")
if CHANGED_CODE not in ("warn", "retrain"):
    raise WorkflowError(f"--config changed_code={CHANGED_CODE}: write warn or retrain")
try:
    EXPERIMENT = load_experiment()
    CLUSTER = load_cluster(CLUSTER_NAME)
except UserError as error:
    raise WorkflowError(str(error)) from None
TABLES, RUNS = EXPERIMENT.tables, EXPERIMENT.runs
DIGITS = [name for name in TABLES if name.startswith("digits-")]


onstart:  # not at a dry run, which needs no Slurm
    if CLUSTER.launcher == "slurm" and workflow.is_main_process:
        try:
            slurm("sinfo", "--noheader")
        except UserError as error:
            raise WorkflowError(str(error)) from None


# The first rule is what a bare `snakemake` makes.
rule demo:
    input:
        "results/tables/demo.md",
        "results/report.html",


rule digits:
    input:
        expand("results/tables/{table}.md", table=DIGITS),
        "results/report.html",


for table in TABLES:
    if table != "demo":

        rule:
            name:
                table
            input:
                f"results/tables/{table}.md",
                "results/report.html",


include: "workflow/rules/common.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/eval.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/versions.smk"
include: "workflow/rules/fresh.smk"
