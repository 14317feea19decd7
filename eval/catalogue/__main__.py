"""``dmd2 catalogue``."""

from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import readable_errors
from dmd2.core.files import write_text


def main(
    root: Annotated[Path, typer.Option(help="folder of the workspace")] = Path("."),
    out: Annotated[Path, typer.Option(help="Parquet file to write")] = Path("results/catalogue.parquet"),
    csv: Annotated[Path | None, typer.Option(help="write the same as CSV")] = None,
    logs: Annotated[Path | None, typer.Option(help="write the logs of all trainings as Parquet")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="only explain all columns")] = False,
) -> None:
    """Write every run of a workspace as one table: configuration, digest, commits, cost, and metrics by snapshot."""
    with readable_errors():
        from eval.catalogue.columns import LOG_SCHEMA, describe, explained, write_parquet
        from eval.catalogue.read import catalogue, training_logs

        if schema:
            print(explained())
            return
        table = catalogue(root)
        write_parquet(table, out, describe(table.columns))
        told = ", ".join(f"{count} {state}" for state, count in table.groupby("state").run.nunique().items())
        print(f"{out}: {len(table)} lines, {len(table.columns)} columns; runs and teachers: {told or 'none'}")
        if csv:
            write_text(csv, table.to_csv(index=False))
        if logs:
            lines = training_logs(root)
            write_parquet(lines, logs, LOG_SCHEMA)
            print(f"{logs}: {len(lines)} values of {lines.run.nunique()} runs")


if __name__ == "__main__":
    typer.run(main)
