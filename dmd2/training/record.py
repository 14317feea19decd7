"""What finished.json says of how a training was made."""

import os
from typing import Any

import torch

from dmd2.core import distributed
from dmd2.core.files import digest_of
from dmd2.core.run import commit
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import TrainConfig

EXECUTED = ("micro_batch", "shard", "checkpointing", "compiled", "graphs")  # each may round differently


def record_of(cfg: TrainConfig, hardware: Hardware, steps: int) -> dict[str, Any]:
    """Device, versions and configuration of a training of `steps` iterations that ends in this process."""
    device = torch.device(hardware.device)
    return {
        "student_updates": cfg.critic.student_updates(steps),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processes": distributed.world_size(),
        "threads": hardware.threads,
        "torch": torch.__version__,
        "deterministic": hardware.deterministic or device.type == "cpu",
        "execution": {name: getattr(hardware, name) for name in EXECUTED},
        "commit": commit(),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "config": cfg.model_dump(mode="json"),
        "settings": digest_of(cfg.settings()),
    }
