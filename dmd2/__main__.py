"""``python -m dmd2``, the same as ``dmd2``."""

import sys
from pathlib import Path

# Without the current folder, where the user's own eval.py may lie.
sys.path[:] = [str(Path(__file__).parents[1]), *(p for p in sys.path if Path(p).absolute() != Path.cwd())]

from dmd2.command.app import main  # noqa: E402

main()
