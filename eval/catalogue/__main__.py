"""``python -m eval.catalogue``."""

import typer

from eval.catalogue.read import main

typer.run(main)
