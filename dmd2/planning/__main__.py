"""``python -m dmd2.planning``."""

import typer

from dmd2.planning.command import main

typer.run(main)
