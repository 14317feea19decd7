"""Commands whose module is imported when they are called, or their own help is asked for, and not before."""

import os
from collections.abc import Callable
from functools import cached_property, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.options import WORKSPACE, workspace

# Where a command works: in the workspace; there or, outside any, in the current folder; always in the current folder.
Place = Literal["workspace", "workspace or here", "here"]
NOWHERE = (
    "there is no workspace here or above: go to one (a folder with workflow/tables), name it with --workspace, "
    "or make one of your images with `dmd2 new-base NAME FOLDER`"
)
Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        help="folder with workflow/, data/ and results/; by default the nearest above",
        envvar=WORKSPACE,
        file_okay=False,
        is_eager=True,
        expose_value=False,
        callback=lambda value: value and os.environ.update({WORKSPACE: str(value.absolute())}),
    ),
]


def _takes_workspace(place: Workspace = None) -> None: ...


def as_command(function: Callable[..., None], name: str, settings: dict[str, Any] | None = None) -> TyperCommand:
    """The command of one function; `settings` are those of its context."""
    app = typer.Typer(add_completion=False)
    app.command(name, context_settings=settings)(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


class LazyCommand(TyperCommand):
    """Stands in the list of commands for the function ``module:name``, which says its own options and help."""

    def __init__(
        self,
        name: str,
        target: str,
        told: str,
        place: Place,
        panel: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, help=told, rich_help_panel=panel)
        self.target, self.place, self.settings = target, place, settings
        self.typed: set[str] = set()

    @cached_property
    def command(self) -> TyperCommand:
        """The command itself, which also takes --workspace."""
        module, name = self.target.split(":")
        function = getattr(import_module(module), name)
        command = as_command(self.placed(function), str(self.name), self.settings)
        command.params += [p for p in as_command(_takes_workspace, "").params if p.name == "place"]
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Of the command itself, in whose name everything from here on is done."""
        context = self.command.make_context(info_name, args, parent, **extra)
        sources = {name: context.get_parameter_source(name) for name in context.params}
        self.typed = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        return context

    def placed(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, called in its place; paths that the user typed stay relative to where the user stands."""

        @wraps(function)
        def call(**values: Any) -> None:
            with readable_errors():
                home, here = workspace(), Path.cwd()
                if home is None and self.place == "workspace":
                    raise UserError(NOWHERE)
                if home not in (None, here) and self.place != "here":
                    paths = {name: values[name] for name in self.typed if isinstance(values[name], Path)}
                    values |= {name: here / path for name, path in paths.items()}
                    os.chdir(home)
            return function(**values)

        return call
