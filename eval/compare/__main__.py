"""``python -m eval.compare``."""

import typer

from eval.compare.command import main

typer.run(main)
