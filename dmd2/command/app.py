"""The command ``dmd2``: what it can do, by name, and where each is written."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from dmd2.command.lazy import LazyCommand, Place, Workspace

MEASURE = "Measure"
# Panels of the help, with name, function, purpose and place of each command.
COMMANDS: dict[str, list[tuple[str, str, str, Place]]] = {
    "From images to a table": [
        ("new-base", "dmd2.bases.command:main", "Bases and a table for images of your own", "workspace or here"),
        ("plan", "dmd2.planning.__main__:main", "Memory, GPUs, hours and disk of a base or table", "workspace"),
        ("run", "dmd2.command.run:run", "Make tables or runs, and all that they need", "workspace"),
        ("doctor", "dmd2.command.doctor:doctor", "What this machine has and lacks", "workspace or here"),
    ],
    "Runs": [
        ("status", "dmd2.launch.command:status", "State, step, rate and time left of runs", "workspace"),
        ("logs", "dmd2.launch.command:logs", "Messages of a run's training, here or on Slurm", "workspace"),
        ("cancel", "dmd2.launch.command:cancel", "Stop the Slurm jobs of runs; nothing saved is lost", "workspace"),
        ("print", "dmd2.launch.command:print_script", "The batch script that Slurm would get", "workspace"),
        ("prune", "dmd2.publish.prune:main", "Delete checkpoints that nothing needs any more", "workspace"),
    ],
    MEASURE: [
        ("compare", "eval.compare.__main__:main", "Two versions of the results, side by side", "workspace"),
        ("catalogue", "eval.catalogue.__main__:main", "All runs as one table, Parquet or CSV", "workspace"),
    ],
    "Convert and share": [
        ("convert", "dmd2.convert.__main__:main", "Networks of EDM and released students", "here"),
        ("export", "dmd2.publish.export:main", "A finished student in diffusers' format", "workspace"),
        ("restore", "dmd2.publish.restore:main", "Pull versioned results and check them", "workspace"),
    ],
}
EVAL: list[tuple[str, str, str, Place]] = [
    ("score", "eval.score.command:score", "Measure a set of images", "here"),
    ("paired", "eval.score.command:paired", "Measure the difference of two sets that share seeds", "here"),
    ("stats", "eval.score.command:stats", "Moments of a set, to compare with later", "here"),
    ("protocols", "eval.score.command:protocols", "Published protocols by name", "here"),
    ("weights", "eval.detectors.weights:main", "Fetch the weights of a network, by checksum", "here"),
]
HANDS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(name="dmd2", no_args_is_help=True, pretty_exceptions_enable=False)


def release() -> str:
    """The version of the package; in a checkout that is not installed, that of its pyproject.toml."""
    try:
        return version("dmd2-workbench")
    except PackageNotFoundError:
        import tomllib

        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["version"])


def _show_version(asked: bool) -> None:
    if asked:
        from dmd2.core.run import commit

        print(f"dmd2 {release()}, commit {commit()}")
        raise typer.Exit


@app.callback()
def dmd2(
    workspace: Workspace = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and the commit.")
    ] = False,
) -> None:
    """Distil diffusion models with DMD2, ablate it, and measure what comes out."""


def group() -> TyperGroup:
    """The command line; no command's module is imported."""
    whole = typer.main.get_command(app)
    assert isinstance(whole, TyperGroup)
    measure = TyperGroup(name="eval", no_args_is_help=True, rich_help_panel=MEASURE)
    measure.help = "Any model's images: folders, zips, npz, npy, safetensors"
    for panel, commands in COMMANDS.items():
        if panel == MEASURE:
            whole.add_command(measure)
        for name, target, told, place in commands:
            settings = HANDS_ON if name == "run" else {}
            whole.add_command(LazyCommand(name, target, told, place, panel, settings))
    for name, target, told, place in EVAL:
        measure.add_command(LazyCommand(name, target, told, place))
    return whole


def main() -> None:
    """Run the command line."""
    sys.exit(group()(prog_name="dmd2"))
