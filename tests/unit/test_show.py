"""Where the lines of a job go: progress to the terminal of Snakemake, messages to the job's log as well."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.core.errors import terminal_of
from tests.conftest import ROOT

SAY = "from dmd2.core.errors import show; show('step 1', kept=False); show('resumes')"
# torchrun's processes have only the streams of their parent.
BELOW = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAY!r}])"


@pytest.mark.parametrize("code", [SAY, BELOW])
@pytest.mark.parametrize("known", [True, False])
def test_progress_goes_to_the_terminal_and_messages_to_the_log_too(tmp_path: Path, code: str, known: bool) -> None:
    with open(tmp_path / "terminal", "w") as terminal:
        place = terminal_of(terminal.fileno()) if known else "1:1"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DMD2_TERMINAL": place}
        command = ["bash", "-c", f"exec 3>&2 &> {tmp_path}/log; exec {sys.executable} -c {shlex.quote(code)}"]
        subprocess.run(command, stderr=terminal, env=environment, check=True)
    written = [(tmp_path / name).read_text() for name in ("terminal", "log")]
    assert written == (["step 1\nresumes\n", "resumes\n"] if known else ["", "step 1\nresumes\n"])


def test_without_a_terminal_all_goes_to_stderr(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMD2_TERMINAL", raising=False)
    exec(SAY)
    assert capsys.readouterr().err == "step 1\nresumes\n"
