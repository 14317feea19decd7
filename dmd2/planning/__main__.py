"""``dmd2 plan``: which base, row or table is asked for, on which machine."""

from typing import Annotated, Literal

import typer

from dmd2.core.errors import UserError, did_you_mean, readable_errors
from dmd2.experiment.cluster import CLUSTERS, load_cluster
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import BASES, TABLES, experiment_with, load_base, readable_tables
from dmd2.experiment.yaml_file import workflow_files
from dmd2.launch.names import complete
from dmd2.networks.light_diffusers import light_diffusers


def asked(name: str) -> tuple[str, str | None, str | None]:
    """The base, and the table or the row of it, that a name means.

    Raises:
        UserError: it means nothing.
    """
    base, _, row = name.partition("/")
    if row or name in (bases := workflow_files(BASES)):
        return base, None, row.partition("/")[0] or None
    if name not in (tables := workflow_files(TABLES)):
        hint = did_you_mean(name, [*bases, *tables], f"; bases: {', '.join(bases)}; tables: {', '.join(tables)}")
        raise UserError(f"there is no base or table {name}{hint}")
    return experiment_with(name).tables[name].base, name, None


def rows_of(base: str, table: str) -> tuple[int, dict[str, RunConfig]]:
    """Number of seeds and the rows of a table.

    Raises:
        UserError: there is no such table, or it is of another base.
    """
    experiment = experiment_with(table)
    if table not in experiment.tables:
        known = sorted(name for name, spec in experiment.tables.items() if spec.base == base)
        hint = did_you_mean(table, known, f"; tables of {base}: {', '.join(known) or 'none'}")
        raise UserError(f"there is no table {table}{hint}")
    spec = experiment.tables[table]
    if spec.base != base:
        raise UserError(f"table {table} is of base {spec.base}, not {base}")
    return len(spec.seeds), {row.run: experiment.runs[base, row.run] for row in experiment.rows[table]}


def main(
    name: Annotated[
        str, typer.Argument(help="a base (digits), a row (digits/dmd2) or a table", autocompletion=complete)
    ],
    table: Annotated[str | None, typer.Option(help="a table of the base NAME", hidden=True)] = None,
    run: Annotated[str | None, typer.Option(help="a row of the base NAME", hidden=True)] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB; default: 24, 40 and 80", min=1)] = None,
    gpus: Annotated[int, typer.Option(help="that share the batch; 0: 8, or the batch if it is less", min=0)] = 0,
    micro_batch: Annotated[int, typer.Option(help="images of one forward pass; 0: as many as fit", min=0)] = 0,
    shard: Annotated[bool, typer.Option("--shard", help="split networks and optimisers over the GPUs")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute activations in backward")] = False,
    lora: Annotated[int, typer.Option(help="rank of a low-rank student; 0: as the base says", min=0)] = 0,
    cluster: Annotated[str | None, typer.Option(help="file in workflow/cluster; default: slurm if it is there")] = None,
    states: Annotated[Literal["fp32", "8bit"] | None, typer.Option(help="of AdamW, instead of the base's")] = None,
    seconds_per_iteration: Annotated[float, typer.Option(help="known rate on these GPUs; 0: look for one", min=0)] = 0,
) -> None:
    """Memory, GPUs, hours and disk of a base, a row, or a table with all seeds, before anything is submitted."""
    with readable_errors():
        base, of_name, row = asked(name)
        table, run = table or of_name, run or row
        of_base = load_base(base)
        cfg = of_base if run is None else readable_tables()[0].config_of(base, run)
        gpus = gpus or min(8, cfg.optim.batch)
        if gpus > cfg.optim.batch:
            raise UserError(f"--gpus {gpus}: {gpus} processes cannot share a batch of {cfg.optim.batch}")
        seeds, rows = rows_of(base, table) if table else (0, {})
        light_diffusers(cfg.data, adapters=lora > 0 or any(c.generator.lora for c in (cfg, *rows.values())))
        from dmd2.planning.memory import Setup
        from dmd2.planning.page import CARDS, plan_page, show, table_page
        from dmd2.planning.plan import Plan, TablePlan, counting, varied
        from dmd2.planning.rates import given

        cfg = varied(cfg, lora, states)
        counted, rate = counting(Setup(gpus if shard else 1, checkpointing)), None
        if seconds_per_iteration:
            rate = given(seconds_per_iteration, gpus, counted(cfg).image_flops * cfg.optim.batch)
        plan = Plan.of(base, run or base, cfg, counted, rate)
        on = cluster or ("slurm" if "slurm" in workflow_files(CLUSTERS) else None)
        machine = None if on is None else (on, load_cluster(on))
        show(plan_page(base, plan, gpus, CARDS if gpu_memory is None else (gpu_memory,), micro_batch, machine))
        if table is not None:
            found = TablePlan(table, seeds, [Plan.of(base, *row, counted, rate) for row in rows.items()])
            text, small = table_page(found, gpus, gpu_memory, micro_batch)
            show(text)
            if small:
                raise UserError(f"--gpu-memory {gpu_memory:g}: {', '.join(small)} of table {table} does not fit")


if __name__ == "__main__":
    typer.run(main)
