"""Start, watch and stop trainings, here or on Slurm, as the cluster file (workflow/cluster) says."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from dmd2.ablations import Table, load_experiment
from dmd2.cluster import Cluster, load_cluster
from dmd2.config import RunConfig, TrainConfig
from dmd2.cost import slurm_cost, wall_clock_cost
from dmd2.errors import UserError, readable_errors
from dmd2.files import read_json, write_json
from dmd2.inputs import Inputs, finished
from dmd2.job import TrainingJob
from dmd2.run import RunId
from dmd2.slurm import SlurmTraining, say
from dmd2.slurm_queue import slurm

app = typer.Typer(help=__doc__, no_args_is_help=True)

Run = Annotated[str, typer.Argument(help="base/name/seedN, for example digits/dmd2/seed0")]
Config = Annotated[str | None, typer.Option(help="JSON of the run; default: what the tables say")]
ClusterName = Annotated[str, typer.Option(help="file in workflow/cluster, without .yaml")]


def run_config(run: RunId, config: str | None) -> TrainConfig:
    """The config given as JSON, or the one the tables name."""
    if config is not None:
        return TrainConfig.model_validate(json.loads(config))
    runs = load_experiment().runs
    if (run.base, run.name) not in runs:
        known = ", ".join(sorted(name for base, name in runs if base == run.base))
        raise UserError(f"no table has the run {run.base}/{run.name}; runs of {run.base}: {known or 'none'}")
    return runs[run.base, run.name].training()


@app.command()
def train(run: Run, config: Config = None, cluster: ClusterName = "local") -> None:
    """Train a run, continue it, or wait for its Slurm job; it is finished when results/runs/RUN/train.json exists."""
    with readable_errors():
        run_id, machine = RunId.parse(run), load_cluster(cluster)
        cfg = run_config(run_id, config)
        if machine.launcher == "slurm":
            train_on_slurm(SlurmTraining(run_id, cfg, machine))
        else:
            train_here(run_id, cfg, machine)


def train_on_slurm(training: SlurmTraining) -> None:
    """Wait for the run's Slurm job, new or old, and publish the result; Ctrl-C leaves the job running."""
    run, job = training.run, None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        job = training.submit_or_attach()
        record = training.wait(job) if job else finished(run, training.cfg, key_of(run, training.cfg))
    except KeyboardInterrupt:
        if job:
            say(run, f"Slurm job {job} goes on without this launcher; the same command waits for it again, "
                     f"`python -m dmd2.launch cancel {run}` stops it")  # fmt: skip
        raise
    assert record is not None
    submissions = run.folder / "job.json"
    jobs = read_json(submissions)["jobs"] if submissions.exists() else []
    publish(run, record, (slurm_cost(jobs) if jobs else None) or wall_clock_cost(record))


def train_here(run: RunId, cfg: TrainConfig, cluster: Cluster) -> None:
    """Train in this process, or in several started by torchrun."""
    if cluster.processes > 1 and "WORLD_SIZE" not in os.environ:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cluster.processes}"]
        os.execv(sys.executable, [sys.executable, *command, "-m", "dmd2.launch", *sys.argv[1:]])
    if cluster.training.nodes > 1:
        raise UserError("training.nodes: several nodes need `launcher: slurm` in the cluster file")
    options = cluster.training
    TrainingJob(
        str(run), cfg.model_dump_json(), cluster.jobs.train.threads, options.device, options.micro_batch
    ).train()
    record = finished(run, cfg, key_of(run, cfg))
    if int(os.environ.get("RANK", "0")) == 0 and record is not None:
        publish(run, record, wall_clock_cost(record))


def key_of(run: RunId, cfg: TrainConfig) -> str:
    """Identity of a training, from its inputs in their usual places."""
    return Inputs.of(run, cfg).key(cfg, run.seed)


def publish(run: RunId, record: dict, cost: dict) -> None:
    """Write train.json, the node of the DAG that says this run is complete."""
    write_json(run.folder / "train.json", {**record, "cost": cost})


@app.command("print")
def print_script(run: Run, config: Config = None, cluster: ClusterName = "slurm") -> None:
    """Show the batch script that `train` would send to Slurm."""
    with readable_errors():
        run_id = RunId.parse(run)
        print(SlurmTraining(run_id, run_config(run_id, config), load_cluster(cluster)).script())


@app.command()
def status(
    names: Annotated[
        list[str] | None, typer.Argument(help="runs or tables; default: every run that was started")
    ] = None,
) -> None:
    """State, step, rate, time left, node, restarts and last losses of runs, as a table."""
    from dmd2.overview import chosen_runs, print_overview

    with readable_errors():
        print_overview(chosen_runs(names or []))


@app.command()
def cancel(runs: Annotated[list[str], typer.Argument(help="base/name/seedN ...")]) -> None:
    """Stop the Slurm jobs of runs; everything saved is kept and `train` continues."""
    with readable_errors():
        for run in map(RunId.parse, runs):
            record = run.folder / "job.json"
            if not record.exists() or not (jobs := read_json(record)["jobs"]):
                raise UserError(f"{run} has no Slurm job")
            slurm("scancel", jobs[-1])
            say(run, f"cancelled Slurm job {jobs[-1]}")


@app.command()
def logs(run: Run, follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing")] = False) -> None:
    """Print the messages of the run's newest Slurm job."""
    with readable_errors():
        run_id = RunId.parse(run)
        record = run_id.folder / "job.json"
        jobs = read_json(record)["jobs"] if record.exists() else []
        path = run_id.folder / "jobs" / f"{jobs[-1]}_0_log.err" if jobs else None
        if path is None or not path.exists():
            raise UserError(f"{run_id} has no log of a Slurm job" + (f" yet ({path})" if path else ""))
        print(f"==> {path}", flush=True)
        os.execv(shutil.which("tail") or "/usr/bin/tail", ["tail", *(["-f"] if follow else []), "-n", "50", str(path)])


@app.command()
def schema(folder: Annotated[Path, typer.Argument(help="where to write them")] = Path("workflow/schemas")) -> None:
    """Write the JSON Schemas of a base, a table and a cluster, for editors."""
    models: dict[str, type[BaseModel]] = {"base": RunConfig, "table": Table, "cluster": Cluster}
    for name, model in models.items():
        write_json(folder / f"{name}.schema.json", model.model_json_schema())


if __name__ == "__main__":
    app()
