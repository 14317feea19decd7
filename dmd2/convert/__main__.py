"""``python -m dmd2.convert``."""

import typer

from dmd2.convert.unets import main

typer.run(main)
