"""Slurm's commands as scripts that answer from files, so that the launcher's tests need no Slurm."""

from pathlib import Path

import pytest

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")
SCRIPT = """#!/bin/sh
name=${{0##*/}}
echo "$name $*" >>"{folder}/calls"
export -p >"{folder}/$name.env"
[ -f "{folder}/$name.err" ] && {{ /bin/cat "{folder}/$name.err" >&2; exit 1; }}
[ -f "{folder}/$name.out" ] && /bin/cat "{folder}/$name.out"
exit 0
"""


class FakeSlurm:
    """Makes PATH consist of these commands alone; each logs its call and its environment."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            (folder / "bin" / name).write_text(SCRIPT.format(folder=folder))
            (folder / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder / "bin"))

    def answer(self, command: str, *lines: str) -> None:
        """What a command prints from now on."""
        (self.folder / f"{command}.err").unlink(missing_ok=True)
        (self.folder / f"{command}.out").write_text("".join(line + "\n" for line in lines))

    def refuse(self, command: str, reason: str) -> None:
        """Let a command fail from now on."""
        (self.folder / f"{command}.err").write_text(reason + "\n")

    def calls(self, command: str) -> list[str]:
        """Its calls so far, with their arguments."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0] == command]

    def environment(self, command: str) -> set[str]:
        """Names of the variables its last call saw."""
        lines = (self.folder / f"{command}.env").read_text().splitlines()
        return {line.split("=")[0].removeprefix("export ") for line in lines if line.startswith("export ")}

    def remove(self) -> None:
        """Leave a machine without Slurm."""
        for name in COMMANDS:
            (self.folder / "bin" / name).unlink()
