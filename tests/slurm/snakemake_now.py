"""Snakemake whose Slurm plugin looks at its jobs every second; as shipped it waits 10 s longer after each look."""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1.0, lambda self, value: None)
sys.exit(main())
