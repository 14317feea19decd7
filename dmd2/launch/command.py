"""Start, watch and stop trainings, on this machine or on Slurm, as the cluster file (workflow/cluster) says."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from dmd2.core.errors import CannotWriteError, UserError, readable_errors
from dmd2.core.files import write_json
from dmd2.core.retraining import When, is_due, make_anew
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import job_name, slurm, squeue, submissions
from dmd2.experiment.cluster import Cluster, load_cluster
from dmd2.experiment.config import RunConfig, TrainConfig
from dmd2.experiment.run_inputs import goal_of
from dmd2.experiment.tables import Table, readable_tables
from dmd2.launch.job import TrainingJob
from dmd2.launch.names import Names, Run, run_named, runs_named
from dmd2.launch.slurm import SlurmTraining
from dmd2.launch.wait import log_path, publish, say

app = typer.Typer(help=__doc__, no_args_is_help=True)

Config = Annotated[str | None, typer.Option(help="JSON of the run; default: what the tables say")]
ChangedCode = Literal["warn", "retrain"]
LOGS = Path("logs/train")  # of the rule (workflow/rules/train.smk)
ClusterName = Annotated[str, typer.Option(help="file in workflow/cluster, without .yaml")]


def run_config(run: RunId, config: str | None) -> TrainConfig:
    """The config given as JSON, or the one the tables name."""
    if config is not None:
        return TrainConfig.model_validate(json.loads(config))
    return readable_tables()[0].config_of(run.base, run.name).training()


@app.command()
def train(
    run: Run,
    config: Config = None,
    cluster: ClusterName = "local",
    again: Annotated[bool, typer.Option("--again", help="from the start, also if it is finished or half done")] = False,
    changed_code: Annotated[ChangedCode, typer.Option(help="what to do with a run that other code trained")] = "warn",
) -> None:
    """Train a run, continue it, or wait for its Slurm job; it is finished when results/runs/RUN/train.json exists."""
    with readable_errors():
        run_id, machine = RunId.parse(run), load_cluster(cluster)
        when: When = "always" if again else "changed" if changed_code == "retrain" else "never"
        cfg = run_config(run_id, config)
        if cfg.train.released:
            from dmd2.training import released  # not above: it imports torch, which a launcher on Slurm does not need

            released.publish_released(run_id, cfg)
        elif machine.launcher == "slurm":
            train_on_slurm(SlurmTraining(run_id, cfg, machine, when))
        else:
            train_here(run_id, cfg, machine, when)


def train_on_slurm(training: SlurmTraining) -> None:
    """Submit the run's Slurm job or find the live one, then become the small process that waits for its end."""
    try:
        job, goal = training.submit_or_attach(), training.goal
    except CannotWriteError as error:
        raise UserError(f"{training.run}: {error}; a Slurm job of it that lives is left to run") from None
    if job is None:
        record = goal.reached()
        assert record is not None
        return publish(goal, record)
    poll = str(training.cluster.training.poll_seconds)
    words = [str(training.run), job, goal.key, json.dumps(goal.made), poll]
    os.execv(sys.executable, [sys.executable, "-m", "dmd2.launch.wait", *words])


def train_here(run: RunId, cfg: TrainConfig, cluster: Cluster, when: When = "never") -> None:
    """Train in this process, or in several started by torchrun."""
    if when != "never" and "WORLD_SIZE" not in os.environ and is_due(goal := goal_of(run, cfg), when):
        make_anew(goal)
    if cluster.processes > 1 and "WORLD_SIZE" not in os.environ:
        words = [word for word in sys.argv[1:] if word != "--again"]
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cluster.processes}"]
        os.execv(sys.executable, [sys.executable, *command, "-m", "dmd2.launch", *words])
    if cluster.training.nodes > 1:
        raise UserError("training.nodes: several nodes need `launcher: slurm` in the cluster file")
    TrainingJob(run, cfg, cluster.hardware).train()
    goal = goal_of(run, cfg)
    if int(os.environ.get("RANK", "0")) == 0 and (record := goal.reached()):
        publish(goal, record)


@app.command()
def warm(run: Run, out: Path, config: Config = None, cluster: ClusterName = "local") -> None:
    """Compile what RUN will run, for all trainings of its base, before they start: write OUT."""
    with readable_errors():
        run_id, machine = RunId.parse(run), load_cluster(cluster)
        cfg, hardware = run_config(run_id, config), machine.hardware
        share = -(-cfg.optim.batch // (machine.processes * machine.training.nodes))  # of process 0, in its passes
        cfg = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"batch": share})})
        seconds = TrainingJob(run_id, cfg, hardware).warm()
        write_json(out, {"run": run, "compiled": hardware.compiled, "seconds": round(seconds, 1)})


@app.command("print")
def print_script(run: Run, config: Config = None, cluster: ClusterName = "slurm") -> None:
    """Show the batch script that a training would send to Slurm."""
    with readable_errors():
        run_id = run_named(run)
        print(SlurmTraining(run_id, run_config(run_id, config), load_cluster(cluster)).script())


@app.command()
def status(names: Annotated[list[str] | None, Names] = None) -> None:
    """State, step, rate, time left, node, restarts and last losses of runs; by default of all that were started."""
    from dmd2.launch.overview import print_overview

    with readable_errors():
        print_overview(runs_named(names or []))


@app.command()
def cancel(names: Annotated[list[str], Names]) -> None:
    """Stop the Slurm jobs of runs; everything saved is kept, and `dmd2 run` goes on from there."""
    with readable_errors():
        idle, entries = [], [entry for entry in squeue().values() if not entry.ended]
        for name in names:
            named = [RunId.parse(name)] if name.count("/") == 2 else runs_named([name])  # also one that is in no table
            jobs = {run: [e.job for e in entries if e.name == job_name(run)] for run in named}
            for run, found in jobs.items():
                if found:
                    slurm("scancel", *found)
                    say(run, f"cancelled Slurm job {', '.join(found)}")
            if not any(jobs.values()):
                idle.append(name)
        if idle and runs_named(idle):
            be = "is" if len(idle) == 1 else "are"
            raise UserError(f"{', '.join(idle)} {be} not running and not waiting in the Slurm queue")


@app.command()
def logs(run: Run, follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing")] = False) -> None:
    """Print the messages of the run's newest Slurm job, or of its training on this machine."""
    with readable_errors():
        run_id = run_named(run)
        jobs = submissions(run_id)["jobs"]
        paths = [*(log_path(run_id, job) for job in jobs[-1:]), LOGS / f"{run_id}.log"]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"{run_id} has no log yet ({' or '.join(map(str, paths))})")
        print(f"==> {path}", flush=True)
        os.execv(shutil.which("tail") or "/usr/bin/tail", ["tail", *(["-f"] if follow else []), "-n", "50", str(path)])


@app.command()
def schema(folder: Annotated[Path, typer.Argument(help="where to write them")] = Path("workflow/schemas")) -> None:
    """Write the JSON Schemas of a base, a table and a cluster, for editors."""
    models: dict[str, type[BaseModel]] = {"base": RunConfig, "table": Table, "cluster": Cluster}
    for name, model in models.items():
        write_json(folder / f"{name}.schema.json", model.model_json_schema())
