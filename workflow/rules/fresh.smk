# What is out of date is decided here, by content and before the DAG exists: by the records in the artefacts
# (dmd2/core/provenance.py), never by clocks or by .snakemake, which a clone or a `dvc pull` does not bring along. Snakemake
# itself compares modification times only (the profiles' rerun-triggers), and is told that all files that the tables know
# are equally old. What is out of date has one input more, which is younger.
import atexit
import os
import sys
import tempfile

from snakemake_interface_storage_plugins.io import Mtime

from dmd2.core.provenance import outdated
from dmd2.core.retraining import trained_by_other_code

STARTED = time.time()
# Input of everything outdated. Of a content that no job has seen, since Snakemake compares checksums, too; and not in the
# workspace, where a dry run writes nothing.
CHANGED = ""
if workflow.is_main_process:
    with tempfile.NamedTemporaryFile("w", prefix="dmd2-changed-", delete=False) as file:
        CHANGED = file.name
        file.write(f"{time.time_ns()}\n")
    atexit.register(Path(CHANGED).unlink, missing_ok=True)


def tell(what, reasons, most=5):
    """A line for each path with its reason, up to `most`."""
    lines = [f"{path} {reason}" for path, reason in reasons.items()]
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    for line in lines[:most] + more:
        print(f"{what}: {line}", file=sys.stderr)


def settle():
    """Tell Snakemake, while it builds the DAG, that all files are equally old and that CHANGED is younger."""
    known = workflow.iocache.mtime
    if CHANGED and CHANGED not in known:
        known.update({path: Mtime(local=STARTED) for path in FILES})
        known[CHANGED] = Mtime(local=STARTED + 1)
        if workflow.executor_plugin is not None and not workflow.dryrun:
            date_back()


def date_back():
    """Files of the future, from a clock that was ahead, get the present time: Snakemake deletes outputs older than their
    inputs. A dry run changes nothing.
    """
    for path in FILES:
        if os.stat(path).st_mtime > STARTED:
            try:
                os.utime(path)
            except OSError as error:
                raise WorkflowError(
                    f"{path} is dated in the future, which cannot be changed ({error.strerror}): touch it"
                )


OUTDATED, FILES = {}, []
if workflow.is_main_process:  # jobs of Slurm read this file again and are told what to do
    found = list(artefacts())
    OUTDATED = outdated(found)
    # Runs and samplers that no table has any more, and what evaluations left behind, are as old as the rest, too.
    made = [*Path("results/runs").glob("*/*/*/*"), *Path("results/teachers").glob("*/*/*")]
    known = {file for a in found for file in (*a.outputs, *a.inputs)} | set(map(str, made))
    known |= {*WEIGHTS_OF.values(), "results/report/index.html", "results/report/methods.html"}
    FILES = [file for file in known if os.path.isfile(file)]
    trained = [a.outputs[0] for a in found if Path(a.outputs[0]).name == "train.json" and a.outputs[0] not in OUTDATED]
    other_code = {path: reason for path in trained if (reason := trained_by_other_code(Path(path)))}
    if CHANGED_CODE == "retrain":
        OUTDATED |= other_code
    else:
        tell("note", other_code)
    tell("out of date", OUTDATED)
