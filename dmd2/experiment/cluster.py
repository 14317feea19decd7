"""What jobs may use on a machine or cluster, and how trainings are started there: workflow/cluster/*.yaml."""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dmd2.experiment.dotted_keys import validate
from dmd2.experiment.section import Positive, Strict
from dmd2.experiment.yaml_file import CODE, ORIGIN, read_named

CLUSTERS = Path("workflow/cluster")


def import_environment() -> dict[str, str]:
    """Environment in which `python -m dmd2` is this code wherever one stands, and no dmd2.py of the user's there.

    An installed package is found without PYTHONPATH, which would put it before the standard library.
    """
    if ORIGIN != CODE:
        return {"PYTHONSAFEPATH": "1"}
    others = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in ("", str(CODE))]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(CODE), *others])}


class Resources(Strict):
    """What one kind of job asks for, by the names of Snakemake's Slurm plugin; what is not set is not asked for."""

    threads: Annotated[Positive, Field(description="CPU threads of each process")] = 1
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="of the networks; auto: cuda if the job sees a GPU"),
    ] = "auto"
    mem_mb: Annotated[Positive | None, Field(description="memory of a node, in MB")] = None
    mem_mb_per_cpu: Annotated[Positive | None, Field(description="memory for each CPU, in MB")] = None
    runtime: Annotated[int, Field(ge=1, description="minutes")] | None = None
    gpu: Annotated[int | str, Field(description="--gpus of one node")] | None = None
    gres: Annotated[str | None, Field(description="generic resources, for example gpu:h100:1")] = None
    cpus_per_gpu: Annotated[int | None, Field(description="CPU cores for each GPU")] = None
    slurm_partition: Annotated[str | None, Field(description="--partition")] = None
    slurm_account: Annotated[str | None, Field(description="--account")] = None
    qos: Annotated[str | None, Field(description="--qos")] = None
    constraint: Annotated[str | None, Field(description="--constraint")] = None
    slurm_extra: Annotated[str, Field(description="further options of sbatch, handed over as they are")] | None = None

    @field_validator("gpu")
    @classmethod
    def _counted(cls, value: int | str | None) -> int | str | None:
        if value is not None and not re.fullmatch(r"([\w.-]+:)?\d+", str(value)):
            raise ValueError(f"{value!r} is no number of GPUs: write 4 or, with a type, h100:4")
        return value

    def snakemake(self) -> dict[str, Any]:
        """The resources of a Snakemake rule, which has threads and the device elsewhere."""
        return self.model_dump(exclude={"threads", "device"}, exclude_none=True)


class Execution(Strict):
    """How a process of a training runs what the method computes; none of it changes the numbers beyond rounding.

    deterministic: also holds for the teacher's training. It is no part of a base, since it chooses between roundings of
        one computation, as the kind of GPU does.
    compiled: by PyTorch, for the shapes of the training; blocks take less time to compile than whole networks.
    graphs: record the kernels of an iteration once and replay them, for networks so small that launching takes longest.
    """

    deterministic: Annotated[
        bool,
        Field(description="kernels that give the same bits every time, also on a GPU; slower there"),
    ] = False
    micro_batch: Annotated[int, Field(ge=0, description="largest batch of a process; 0: all of its share")] = 0
    shard: Annotated[bool, Field(description="split networks and optimisers over the processes (FSDP2)")] = False
    checkpointing: Annotated[bool, Field(description="recompute activations in backward instead of keeping them")] = (
        False
    )
    compiled: Annotated[Literal["none", "blocks", "network"], Field(description="passes compiled by PyTorch")] = "none"
    compile_cache: Annotated[str, Field(description="its code; TORCHINDUCTOR_CACHE_DIR overrides it")] = "data/compiled"
    graphs: Annotated[bool, Field(description="replay iterations as CUDA graphs; one process on a GPU")] = False

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.shard and (self.compiled != "none" or self.graphs):
            raise ValueError("shard gathers weights in a pass, which is neither compiled nor recorded: leave out one")
        if self.checkpointing and self.compiled == "network":
            raise ValueError("checkpointing recomputes blocks, which compiled: network dissolves: use compiled: blocks")
        return self


class Training(Execution):
    """How trainings run in their jobs."""

    nodes: Annotated[Positive, Field(description="of one training")] = 1
    processes: Annotated[int, Field(ge=0, description="per node; 0: one for each GPU of `gpu`, or one")] = 0
    signal_seconds: Annotated[int, Field(ge=1, description="warning before the time limit, to save and requeue")] = 120
    poll_seconds: Annotated[float, Field(gt=0, description="between two looks of all waiting launchers")] = 15

    @model_validator(mode="before")
    @classmethod
    def _device_of_the_job(cls, values: Any) -> Any:
        if isinstance(values, dict) and "device" in values:
            raise ValueError("device is a key of jobs.train now, as of every kind of job: write it there")
        return values


@dataclass(frozen=True)
class Hardware:
    """What one process of a training runs on, and how; it changes nothing beyond rounding. See `Execution`."""

    device: str = "cpu"
    threads: int = 1
    micro_batch: int = 0
    shard: bool = False
    checkpointing: bool = False
    deterministic: bool = False
    compiled: Literal["none", "blocks", "network"] = "none"
    compile_cache: str = "data/compiled"
    graphs: bool = False


class Jobs(Strict):
    """Resources by kind of job, which are rules of the Snakefile."""

    real_data: Annotated[Resources, Field(description="decodes images")]
    encode: Annotated[Resources, Field(description="prompts and latents of text runs")] = Resources()
    detector: Annotated[Resources, Field(description="trains or checks the network of the features")]
    reference: Annotated[Resources, Field(description="features of the real set")]
    teacher: Annotated[Resources, Field(description="trains or converts the teacher")]
    pairs: Annotated[Resources, Field(description="teacher pairs")]
    train: Annotated[Resources, Field(description="trainings")]
    evaluate: Annotated[Resources, Field(description="sampling and features of runs")]


class Cluster(Strict):
    """A machine (`launcher: local`) or a Slurm cluster (`launcher: slurm`, trainings through submitit)."""

    launcher: Annotated[Literal["local", "slurm"], Field(description="how trainings are started")]
    all: Annotated[Resources, Field(description="for every kind of job that does not say otherwise")] = Resources()
    setup: Annotated[list[str], Field(description="shell commands at the start of each job")] = []
    container: Annotated[str, Field(description="command in front of python in each job")] = ""
    jobs: Annotated[Jobs, Field(description="by kind of job")]
    training: Annotated[Training, Field(description="how trainings run")] = Training()

    @model_validator(mode="before")
    @classmethod
    def _merge_all(cls, values: Any) -> Any:
        common, jobs = values.get("all"), values.get("jobs")
        if not isinstance(common, dict) or not isinstance(jobs, dict):
            return values
        kinds = {"encode": {}, **jobs}  # files written before there were text runs do not name it
        return {**values, "jobs": {k: common | own if isinstance(own, dict) else own for k, own in kinds.items()}}

    @model_validator(mode="after")
    def _one_process_replays(self) -> Self:
        if self.training.graphs and (self.jobs.train.device == "cpu" or self.training.nodes * self.processes > 1):
            raise ValueError("training.graphs is for one process on one GPU: leave it out, or the other processes")
        return self

    @model_validator(mode="after")
    def _fits_slurm(self) -> Self:
        runtime, seconds = self.jobs.train.runtime, self.training.signal_seconds
        if self.launcher == "local":
            return self
        if runtime is None:
            raise ValueError("jobs.train.runtime (minutes) is missing: Slurm trainings are requeued at their limit")
        # Slurm sends the signal up to a minute early, and a job must get on between two savings.
        if seconds + 60 >= runtime * 60:
            told = f"leaves no time to train in jobs.train.runtime {runtime} min"
            raise ValueError(f"training.signal_seconds {seconds} {told}")
        for kind, job in self.jobs:
            asks = job.gpu or job.gres or job.cpus_per_gpu or "gpu" in (job.slurm_extra or "")
            if job.device == "cuda" and not asks:
                raise ValueError(f"jobs.{kind}.device is cuda, but the job asks Slurm for no GPU: give it gpu or gres")
        return self

    @property
    def python(self) -> str:
        """Shell command that starts Python in a job, after its `setup`."""
        return f"{self.container} python" if self.container else shlex.quote(sys.executable)

    def command(self) -> str:
        """Start of the command line of every job but trainings: `setup`, then Python."""
        python = f"{self.container} python" if self.container else "python"
        return " && ".join([*self.setup, python])

    @property
    def hardware(self) -> Hardware:
        """How each process of a training runs."""
        values = self.training.model_dump(include=set(Execution.model_fields))
        return Hardware(self.jobs.train.device, self.jobs.train.threads, **values)

    @property
    def processes(self) -> int:
        """Processes of a training on each node."""
        gpus = int(str(self.jobs.train.gpu or 0).split(":")[-1])
        return self.training.processes or gpus or 1


def load_cluster(name: str, folder: Path = CLUSTERS) -> Cluster:
    """Read ``workflow/cluster/NAME.yaml``; see `Cluster`.

    Raises:
        UserError: one sentence with file, line and key.
    """
    return validate(Cluster, *read_named("cluster", name, folder))
