"""The wheel has all that git has of the packages and of the workflow, so that `pip install` is enough to run it."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.workspace import copied_files

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def test_the_wheel_has_the_packages_their_data_and_the_workflow(tmp_path: Path) -> None:
    files = copied_files(tmp_path / "source")
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    built = subprocess.run(command, cwd=tmp_path / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = zipfile.ZipFile(tmp_path / built.stdout.split()[-1])
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name for name in files if name.startswith(("dmd2/", "eval/"))}
    assert packed == expected | {f"dmd2/{name}" for name in files if name.startswith("workflow/")}
    (scripts,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"dmd2 = dmd2." in wheel.read(scripts)
