"""Options that command lines share. A command imports PyTorch when it has work to do, so that ``--help`` is at once."""

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where this process sees a GPU")]
