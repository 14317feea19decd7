"""What lies outside a GPU: rows of sets on disk, and the host memory of a node during a training."""

from dataclasses import dataclass

from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import TrainConfig
from dmd2.planning.memory import Counted

GPU_PROCESS, CPU_PROCESS = 3.0, 1.0  # GiB; interpreter and libraries, with those of CUDA or without
MB = 10**6  # bytes; Slurm's are 2^20, which leaves a little over
STORED = {"text": 2, "pooled": 2, "time_ids": 4, "labels": 8}  # bytes of an element, as sets and pairs keep it
FLOAT, HALF = 4, 2  # bytes


def condition_bytes(counted: Counted) -> int:
    """Bytes of one sample's condition in a set: its label, or its text states in float16."""
    found = vars(counted.condition(counted.models.teacher, 1)).items()
    return sum(value.numel() * STORED[name] for name, value in found if value is not None)


def image_bytes(cfg: TrainConfig) -> int:
    """Bytes of one image of the real set: uint8, or a latent in float16."""
    return cfg.data.channels * cfg.data.resolution**2 * (HALF if cfg.data.latents else 1)


@dataclass(frozen=True)
class Host:
    """Bytes that one node must have for a training, beyond files that are mapped and the system's to drop.

    processes: of the node, libraries alone (assumed), and on a CPU what a GPU would hold. saving: the student's weights
    for a snapshot, in process 0; of split networks, if it is more, the node's rows of a checkpoint.
    """

    processes: float
    saving: int

    @staticmethod
    def of(counted: Counted, cluster: Cluster, peak: float) -> "Host":
        """For the trainings of a cluster file; `peak` is what the tensors of a process take."""
        job, nodes, count = cluster.jobs.train, cluster.training.nodes, cluster.processes
        on_gpu = job.device == "cuda" or (job.device == "auto" and bool(job.gpu or job.gres))
        each = GPU_PROCESS * 2**30 if on_gpu else CPU_PROCESS * 2**30 + peak
        saving = counted.parameters["student"] * FLOAT
        if cluster.training.shard and count * nodes > 1:
            kept = [counted.parameters.get(name, 0) for name in ("student", "critic", "head", "EMA")]
            saving = max(saving, -(-(sum(kept) * FLOAT + counted.moments) // nodes))
        return Host(count * each, saving)

    @property
    def megabytes(self) -> int:
        """All of it."""
        return -(-round(self.processes + self.saving) // MB)


def asked(cluster: Cluster) -> int | None:
    """MB of a node that the cluster file asks for trainings, None where it leaves that to the cluster."""
    job = cluster.jobs.train
    if job.mem_mb_per_cpu is not None and job.mem_mb is None:
        return job.mem_mb_per_cpu * job.threads * cluster.processes
    return job.mem_mb


def told(host: Host, cluster: Cluster, name: str) -> str:
    """The host memory of a node in a sentence, and whether the cluster file asks for enough."""
    need, has = host.megabytes, asked(cluster)
    text = (
        f"Host memory of a node, {cluster.processes} process{'es' * (cluster.processes > 1)} (workflow/cluster/{name}"
        f".yaml): {host.processes / MB:,.0f} MB for processes (assumed, of a GPU) + {host.saving / MB:,.0f} MB to save "
        "(computed); mapped files not counted."
    )
    if has is not None and has < need:
        text += f"\nToo small: jobs.train asks for {has} MB of memory of a node; set mem_mb to {need} or more."
    return text
