"""Compiled passes and recorded iterations compute what plain ones do, and are compiled or recorded once."""

import itertools
import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from dmd2.core.errors import UserError
from dmd2.core.rng import Draws
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Execution, Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.launch import command
from dmd2.launch.job import TrainingJob
from dmd2.method.step import train_step
from dmd2.training import execution
from dmd2.training.execution import ReplayedStep, blocks_of, compile_passes, executed, refuse
from dmd2.training.trainer import Training
from tests import tiny

FOUR = {"generator": {"input": "backward_simulation", "steps": 4, "time": 80.0}}
GUIDED_WITHIN = {"generator": {**FOUR["generator"], "isg": 0.5}, "dm__guidance": [2.0, 8.0]}
REAL = {"generator": {"input": "noised_real", "steps": 4, "time": 80.0}}


@pytest.mark.parametrize(
    ("what", "kind"), [("blocks", "edm-attention"), ("network", "edm-attention"), ("blocks", "flow-sd3")]
)
def test_compiled_passes_change_nothing_and_are_compiled_in_the_first_two_turns(what, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cfg = tiny.config(kind, critic__ratio=2)
    plain, compiled = (tiny.models(kind, cfg) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    compile_passes(compiled, what, str(tmp_path), backend="eager")
    batches, graphs = tiny.batches(kind, cfg), []
    for it in range(6):
        expected, found = (train_step(m, batches.at(it), it, cfg) for m in (plain, compiled))
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-7
        )
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 5  # a student's turn with the critic's, and the critic's alone
    assert counters["graph_break"] == {}


def test_passes_of_as_many_lengths_as_captions_are_compiled_for_all_and_not_recorded(monkeypatch):
    m, told = tiny.models("flow-sd3", tiny.config("flow-sd3")), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: told.append(options["dynamic"]))
    compile_passes(m, "blocks", "nowhere")
    monkeypatch.setattr(type(m.teacher.family), "lengths_vary", True)
    compile_passes(m, "blocks", "nowhere")
    assert told == [False] * (len(told) // 2) + [None] * (len(told) // 2)
    with pytest.raises(
        UserError, match=r"training.graphs records passes of one shape, and those of SD3Transformer2DModel"
    ):
        executed(m, Hardware("cuda", graphs=True))


@pytest.mark.parametrize(("kind", "count"), [("edm-attention", 8), ("eps-text", 8), ("flow-sd3", 2)])
def test_every_block_is_compiled_once(kind, count):
    blocks = list(blocks_of(tiny.denoiser(kind)))
    assert len(blocks) == len({id(block) for block in blocks}) >= count
    assert not any(a in set(b.modules()) - {b} for a, b in itertools.permutations(blocks, 2))


class Recorder:
    """Stands in for a CUDA graph: runs the recorded function again, in which nothing may be drawn."""

    def __init__(self, monkeypatch):
        self.recorded, self.replayed, self.patch = 0, 0, monkeypatch

    def __call__(self, launch):
        self.recorded += 1

        def refused(_, name):
            raise AssertionError(f"a draw of {name} inside a recorded iteration")

        def replay():
            self.replayed += 1
            with self.patch.context() as patch:
                patch.setattr(Draws, "_stream", refused)
                return launch()

        return replay


@pytest.mark.parametrize(
    "changes", [{}, {"optim__batch": 5}, FOUR, GUIDED_WITHIN, REAL, {"critic__shares_iteration": False}]
)
def test_replayed_iterations_are_those_of_the_step(changes, monkeypatch):
    cfg = tiny.config("edm", **{"critic__ratio": 3, "regression__weight": 0.5, "optim__warmup": 40, **changes})
    plain, replayed = (tiny.models("edm", cfg) for _ in range(2))
    recorder = Recorder(monkeypatch)
    step, batches = ReplayedStep(replayed, recorder), tiny.batches("edm", cfg)
    for it in range(24):
        expected, found = train_step(plain, batches.at(it), it, cfg), step(replayed, batches.at(it), it, cfg)
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-6
        )  # a rate in float32 is rounded
    kinds = 8 if changes in (FOUR, GUIDED_WITHIN) else 2
    assert recorder.recorded <= kinds and recorder.replayed >= 24 - 2 * kinds


def test_a_graph_is_recorded_beside_threads_and_its_logs_are_copies(monkeypatch):
    told, static = {}, torch.zeros(())
    graph = SimpleNamespace(replay=lambda: static.add_(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _, **options: nullcontext(told.update(options)))
    monkeypatch.setattr(torch, "stack", lambda values: values[0][None])  # of what a graph writes to again and again
    replay = execution._cuda_graph("pool")(lambda: {"loss": static})
    first, second = replay(), replay()
    assert (first["loss"].item(), second["loss"].item()) == (1, 2)
    # Otherwise the thread that pins the rows of the next iteration would break the recording of this one.
    assert told == {"pool": "pool", "capture_error_mode": "thread_local"}


def test_training_runs_compiled_and_its_probe_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("dmd2.training.sampling.PROBES", [0, 1, 2])
    monkeypatch.setattr(execution, "compile_passes", partial(compile_passes, backend="eager"))
    real = tiny.real_set(Path("set.json"), "edm", tiny.tensors("edm", 32, seed=9))
    inputs = Inputs(tiny.teacher(Path("teacher"), "edm", "tiny"), real, None, None)
    cfg = tiny.config("edm", critic__ratio=2, train__steps=4, train__log_every=2, train__precision="bf16-body")
    torch._dynamo.reset()
    counters.clear()
    training = Training(RunId("tiny", "compiled", 0), cfg.training(), Hardware(compiled="network"), inputs)
    training.iterate()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    training.probe()
    assert counters["stats"]["unique_graphs"] == graphs
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "data/compiled")


def test_what_cannot_be_executed_is_refused(monkeypatch):
    cfg = tiny.config("edm")
    with pytest.raises(UserError, match="tiny: training.graphs needs one process on a GPU, and there are 1 on a cpu"):
        refuse("tiny", cfg, Hardware(graphs=True))
    with pytest.raises(UserError, match="training.graphs cannot record the update of optim.states 8bit"):
        refuse("tiny", tiny.config("edm", optim__states="8bit"), Hardware("cuda", graphs=True))
    with pytest.raises(UserError, match="training.compiled: a transformer's passes are compiled block by block"):
        refuse("tiny", tiny.config("flow-sd3"), Hardware(compiled="network"))
    monkeypatch.setattr(execution.distributed, "world_size", lambda: 64)
    with pytest.raises(UserError, match="64 processes cannot share a batch of"):
        refuse("tiny", cfg, Hardware())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shard": True, "compiled": "blocks"}, "shard gathers weights in a pass"),
        ({"shard": True, "graphs": True}, "shard gathers weights in a pass"),
        ({"checkpointing": True, "compiled": "network"}, "use compiled: blocks"),
        ({"compiled": "everything"}, "compiled"),
    ],
)
def test_combinations_of_a_cluster_file_that_do_not_fit_are_told(changes, told):
    with pytest.raises(ValidationError, match=told):
        Execution.model_validate(changes)
    assert Execution.model_validate({"checkpointing": True, "compiled": "blocks", "graphs": True}).graphs


@pytest.mark.parametrize(("batch", "processes", "share"), [(280, 8, 35), (280, 1, 280), (2048, 8, 256)])
def test_what_is_compiled_beforehand_is_what_a_process_runs(monkeypatch, tmp_path, batch, processes, share):
    """Its share of a batch in its micro-batches, not the whole batch in them: 35 images are no 40."""
    machine = SimpleNamespace(processes=processes, training=SimpleNamespace(nodes=1), hardware=Hardware(micro_batch=40))
    seen = []
    monkeypatch.setattr(command, "load_cluster", lambda name: machine)
    monkeypatch.setattr(TrainingJob, "warm", lambda job: seen.append((job.cfg.optim.batch, job.hardware)) or 0.0)
    config = json.dumps(tiny.config("edm", optim__batch=batch).training().model_dump(mode="json"))
    command.warm("tiny/dmd2/seed0", tmp_path / "compiled.json", config)
    assert seen == [(share, machine.hardware)]
