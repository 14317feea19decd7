"""``python -m dmd2.launch``."""

from dmd2.launch.command import app

app()
