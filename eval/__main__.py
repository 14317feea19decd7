"""``python -m eval``."""

from eval.score.command import app

app()
