"""``python -m dmd2``, the same as ``dmd2``."""

import sys
from pathlib import Path

# Not the current folder, where the user's eval.py may lie.
sys.path[0] = str(Path(__file__).parents[1])

from dmd2.command.app import main  # noqa: E402

main()
