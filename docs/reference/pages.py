"""All generated pages of the reference: commands and YAML files here, lists in `docs.reference.lists`."""

import html
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import yaml
from typer import Context
from typer.core import TyperCommand, TyperGroup

from dmd2.command.app import group
from dmd2.command.lazy import LazyCommand
from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import RunConfig
from dmd2.experiment.table_config import Preset, Table
from docs.reference.lists import catalogue, claims, metrics, protocols
from docs.reference.markdown import anchor, page, table
from docs.reference.sections import Section, sections

ROOT = Path(__file__).parents[2]
MODULES = ("dmd2.method.step", "dmd2.method.passes", "eval.catalogue.read", "eval.metrics.frechet")
LIKE = (
    "A base may be `like`{ #like } another one (`like: digits`) and then says only what differs: sections are merged "
    "key by key; lists, networks, and sources or samplers of another kind are replaced."
)


def pages() -> dict[str, str]:
    """Markdown of every generated page, by its place without ``.md``."""
    return {
        "commands": commands(),
        "base": yaml_file("Base files", "base", RunConfig, LIKE),
        "table": yaml_file("Table files", "tables", Table),
        "preset": yaml_file("Preset files", "presets", Preset),
        "cluster": yaml_file("Cluster files", "cluster", Cluster),
        "metrics": metrics(),
        "protocols": protocols(),
        "claims": claims(),
        "catalogue": catalogue(),
        "python": page("Python modules", *(f"::: {name}" for name in MODULES)),
    }


def yaml_file(title: str, folder: str, model: type, *notes: str) -> str:
    """The page of one kind of file in ``workflow/FOLDER``: its keys, its sections, and the files that are there."""
    top, *rest = sections(model)
    files = sorted((ROOT / "workflow" / folder).glob("*.yaml"))
    blocks = [f"`workflow/{folder}/*.yaml`. {top.text}", *notes, _keys(top)]
    for part in rest:
        kind = part.anchor.removeprefix(part.places[0]).replace("-", " ")  # where a key may be one of two sections
        blocks += [f"## `{part.places[0]}`{kind} {{ #{part.anchor} }}", part.text, *_also(part), _keys(part)]
    listed = [(f"`{path.stem}`{{ #file-{path.stem} }}", _first_words(path)) for path in files]
    return page(title, *blocks, "## Files of this repository { #files }", table(("name", "what it is"), listed))


def _keys(part: Section) -> str:
    rows = ((anchor(key.name), key.values, key.default, key.meaning) for key in part.keys)
    return table(("key", "value", "default", "meaning"), rows)


def _also(part: Section) -> Iterator[str]:
    if len(part.places) > 1:
        yield "The same keys: " + ", ".join(f"`{place}`" for place in part.places[1:]) + "."


def _first_words(path: Path) -> str:
    """The title in a YAML file, else the comment that it begins with."""
    text = path.read_text(encoding="utf-8")
    title = (yaml.safe_load(text) or {}).get("title")
    lines = [line for line in text.splitlines() if not line.startswith("# yaml-language-server")]
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return str(title or " ".join(line.lstrip("# ") for line in lines[:count]))


def commands() -> str:
    """All commands with their help, from the command line itself."""
    whole = group()
    blocks = [f"{whole.help} Every command takes `--help` and `--workspace`.", _options(whole)]
    for panel, listed in groupby(_all(whole), lambda found: found[0]):
        blocks.append(f"## {panel}")
        for _, name, command in listed:
            usage = command.get_usage(Context(command, info_name=f"dmd2 {name}")).removeprefix("Usage: ")
            blocks += [f"### dmd2 {name} {{ #{name.replace(' ', '-')} }}", str(command.help)]
            blocks += [f"```text\n{' '.join(usage.split())}\n```", _options(command)]
    return page("Commands", *blocks)


def _all(whole: TyperGroup) -> Iterator[tuple[str, str, TyperCommand]]:
    """Panel, name and function of every command, those of a group with its name before theirs."""
    for name, command in whole.commands.items():
        if isinstance(command, TyperGroup):
            below = {f"{name} {inner}": function for inner, function in command.commands.items()}
        else:
            below = {name: command}
        for full, function in below.items():
            if isinstance(function, LazyCommand):
                yield str(getattr(command, "rich_help_panel", "")), full, function.command


def _options(command: TyperCommand | TyperGroup) -> str:
    context = Context(command)
    named = [param for param in command.params if param.name != "place"]  # --workspace, said once
    records = [record for param in named if (record := param.get_help_record(context))]
    rows = [(f"`{names}`", html.escape(told.replace("  [", " ["))) for names, told in records]
    return table(("argument or option", "meaning"), rows) if rows else ""
