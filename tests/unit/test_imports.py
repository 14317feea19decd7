"""What a process imports: commands show their help at once, and pixel runs do without what only others need."""

import subprocess
import sys

import pytest

from dmd2.networks.light_diffusers import hidden

JOBS = [
    "dmd2.data",
    "dmd2.launch",
    "dmd2.training",
    "eval.detectors",
    "eval.report.page",
    "eval.report.tables",
    "eval.runs",
]
HEAVY = {"torch", "diffusers", "transformers", "scipy", "pandas", "pyarrow", "matplotlib"}
SHOWN = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
LOADED = "\nexcept SystemExit: print(*{'torch', 'diffusers', 'transformers', 'scipy.stats'} & {*sys.modules}, file=sys.stderr)"
ALL = f"""
import sys
from contextlib import suppress
from dmd2.command.app import EVAL, group
def helped(*words):
    with suppress(SystemExit):
        group()([*words, "--help"], prog_name="dmd2")
    print(*(f"{{words}}:{{name}}" for name in sys.modules if name in {HEAVY}), file=sys.stderr)
helped()
print(*(name for name in sys.modules if name.startswith(("dmd2.experiment", "dmd2.launch", "eval"))), file=sys.stderr)
for name in group().commands:
    helped(name)
for name, *_ in EVAL:
    helped("eval", name)
"""


def imported(code: str) -> list[str]:
    """Words that a fresh Python process prints to stderr."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_is_shown_without_pytorch(job: str) -> None:
    assert imported(SHOWN.format(job) + LOADED) == []


def test_help_of_every_command_is_shown_without_a_large_library() -> None:
    assert imported(ALL) == []


LIGHT = """
import sys
from dmd2.experiment.tables import load_experiment
from dmd2.networks.light_diffusers import light_diffusers
data = load_experiment().bases["{base}"].data
if data.text is not None:
    data = data.model_copy(update={{"text": data.text.model_copy(update={{"latents": {latents}}})}})
light_diffusers(data)
import dmd2.training.trainer, eval.runs.evaluate
needless = {{"peft", "transformers", "torchao", "scipy.stats", "pandas", "diffusers.models.transformers.transformer_flux"}}
print(*needless & {{*sys.modules}}, file=sys.stderr)
"""


@pytest.mark.parametrize("base", ["digits", "emoji"])
def test_runs_in_pixels_import_no_package_of_encoders(base: str) -> None:
    assert imported(LIGHT.format(base=base, latents=False)) == []


def test_runs_in_latents_import_diffusers_with_all_that_it_finds() -> None:
    assert "transformers" in imported(LIGHT.format(base="emoji", latents=True))


def test_hidden_packages_are_there_again_afterwards() -> None:
    import transformers

    with hidden("transformers", "tabnanny"), pytest.raises(ImportError):
        import tabnanny
    import tabnanny

    assert sys.modules["transformers"] is transformers and tabnanny.check
