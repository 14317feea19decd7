"""A metric is said once: an entry of the registry and one function can be asked for, measured, printed and explained."""

import subprocess
import sys
from math import nan

import pytest

from dmd2.experiment.metrics import BETTER, METRICS, NUMBERS, OF_RUNS, best_first, measured, options
from eval.metrics import appearance, measures
from tests.conftest import ROOT

ADD_ONE = """
import json, sys, types
from pathlib import Path
from typer.testing import CliRunner

path = Path("dmd2/experiment/metrics.py").resolve()
source = path.read_text()
for table, entry in {
    "_NUMBERS": 'Number("spread", "Spread of features", "higher", "feature units", "mean SD over the features"),',
    "_METRICS": 'Metric("spread", "detector", "spread", (), "spread", "Spread{of}", is_paired=True),',
}.items():
    assert f"\\n{table} = (\\n" in source
    source = source.replace(f"\\n{table} = (\\n", f"\\n{table} = (\\n    {entry}\\n")
registry = sys.modules["dmd2.experiment.metrics"] = types.ModuleType("dmd2.experiment.metrics")
exec(compile(source, path, "exec"), vars(registry))

from eval.metrics import measures
from eval.metrics.estimate import mean

measures.spread = lambda sample: [mean(sample.features.std(axis=1))]

from safetensors.torch import save_file

from eval.catalogue.columns import describe
from dmd2.publish.table_text import label
from eval.score import call, command
from dmd2.experiment.checks.measurement import metric_problems
from tests.eval.test_features import Quadrants, draw
from tests.eval.test_protocols import protocol, sampled
from tests.tiny import config

place = Path(sys.argv[1])
expected = Quadrants()(draw(list(range(300))))[0].numpy().std(axis=1).mean()
assert not list(metric_problems(config(eval__metrics=["spread"]), False))
run = protocol(Quadrants(), eval__metrics=["fd", "spread"], eval__draws=1)
found = run.measure(sampled, {}, place / "features")
assert list(found) == ["fd", "spread"] and abs(found["spread"].value / expected - 1) < 1e-6 and found["spread"].se > 0
save_file({"images": draw(list(range(300)))}, place / "a.safetensors")
save_file({"images": draw(list(range(300, 600)))}, place / "b.safetensors")
call.load_detector = lambda *_: Quadrants()
out = str(place / "out.json")
sets = [str(place / f"{name}.safetensors") for name in "ab"]
common = ["--detector", "quadrants", "--metrics", "spread", "--cache", str(place / "cache"), "--json", out]
result = CliRunner().invoke(command.app, ["paired", *sets, *common])
assert result.exit_code == 0, result.output
rows = json.loads(Path(out).read_text())["rows"]
assert [row["metric"] for row in rows] == ["Spread (quadrants)"] * 3
assert abs(rows[0]["value"] / expected - 1) < 1e-6 and rows[2]["se"] > 0
assert label("spread") == "Spread of features" and registry.best_first("spread", 2.0) == -2.0
assert describe(["spread", "spread_se"])["spread_se"].unit == "feature units"
"""


def test_one_entry_and_one_function_add_a_metric_everywhere(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", ADD_ONE, str(tmp_path)], cwd=ROOT, check=True)


def test_every_metric_has_its_function_and_its_numbers() -> None:
    for metric in METRICS.values():
        module = appearance if metric.sees == "pixels" else measures
        assert not metric.function or callable(getattr(module, metric.function))
    assert {*measured([*OF_RUNS]), "brightness_std"} == NUMBERS.keys()
    assert len(set(options())) == len(options()) and set(options(paired=True)) < set(options())


@pytest.mark.parametrize(("metric", "values"), [("fd", [1.0, 2.0, nan]), ("accuracy", [0.9, 0.8, nan])])
def test_the_best_comes_first_and_nan_last(metric, values) -> None:
    assert sorted(reversed(values), key=lambda value: best_first(metric, value)) == values


def test_brightness_has_no_best() -> None:
    assert "brightness" not in BETTER
    with pytest.raises(KeyError):
        best_first("brightness", 0.5)
