"""``python -m dmd2.bases``, which is ``dmd2 new-base``."""

import typer

from dmd2.bases.command import main

if __name__ == "__main__":
    typer.run(main)
