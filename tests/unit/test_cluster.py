"""Cluster files: what the shipped ones say, how `all` is merged, and where a mistake is."""

import re
import shlex
import sys

import pytest
import yaml

from dmd2.core.errors import UserError
from dmd2.experiment.cluster import CLUSTERS, Cluster, load_cluster

KINDS = ("real_data", "encode", "detector", "reference", "teacher", "pairs", "train", "evaluate")
SLURM = """\
launcher: slurm
all: {slurm_partition: gpu, mem_mb: 8000}
jobs:
  real_data: {runtime: 5}
  detector: {runtime: 5}
  reference: {runtime: 5}
  teacher: {runtime: 5}
  pairs: {runtime: 5}
  train: {runtime: 60, gpu: 1, mem_mb: 64000}
  evaluate: {runtime: 5}
training: {nodes: 1}
"""


def cluster(tmp_path, old="", new=""):
    """The file above with one piece of text replaced, as `load_cluster` reads it."""
    assert old in SLURM
    (tmp_path / "mine.yaml").write_text(SLURM.replace(old, new, 1) if old else SLURM)
    return load_cluster("mine", tmp_path)


def values(train=(), **others):
    """The same file as Python values, with other settings of `jobs.train` and of the top level."""
    made = yaml.safe_load(SLURM)
    made["jobs"]["train"].update(train)
    return Cluster.model_validate({**made, **others})


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_a_shipped_file_loads_and_names_every_kind_of_job(name, root):
    made = load_cluster(name, root / CLUSTERS)
    assert made.launcher == name
    assert set(made.jobs.model_dump()) == set(KINDS)


def test_on_slurm_a_job_for_a_gpu_asks_for_one(tmp_path, root):
    shipped = load_cluster("slurm", root / CLUSTERS).jobs
    wanted = {kind for kind in KINDS if getattr(shipped, kind).device == "cuda"}
    assert wanted == {"encode", "reference", "teacher", "pairs", "train", "evaluate"}
    assert all(getattr(shipped, kind).snakemake()["gpu"] == 1 for kind in wanted)
    with pytest.raises(
        UserError, match=r"jobs\.pairs\.device is cuda, but the job asks Slurm for no GPU: give it gpu or"
    ):
        cluster(tmp_path, "pairs: {runtime: 5}", "pairs: {runtime: 5, device: cuda}")


def test_all_is_merged_into_every_kind_and_a_kind_overrides_it(tmp_path):
    jobs = cluster(tmp_path).jobs
    assert {getattr(jobs, kind).slurm_partition for kind in KINDS} == {"gpu"}
    assert (jobs.pairs.mem_mb, jobs.train.mem_mb) == (8000, 64000)


def test_what_is_not_set_is_not_asked_for(tmp_path):
    assert cluster(tmp_path).jobs.pairs.snakemake() == {"mem_mb": 8000, "runtime": 5, "slurm_partition": "gpu"}


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("slurm_partition", "slurm_partion", 2, "no key all.slurm_partion, did you mean all.slurm_partition?"),
        ("pairs: {runtime", "pairs: {runtme", 8, "no key jobs.pairs.runtme, did you mean jobs.pairs.runtime?"),
        ("nodes", "nods", 11, "no key training.nods, did you mean training.nodes?"),
        ("nodes: 1", "device: cuda", 11, "training: device is a key of jobs.train now"),
        ("detector", "detektor", 5, "no key jobs.detektor, did you mean jobs.detector?"),
        ("training", "traning", 11, "no key traning, did you mean training?"),
        ("evaluate: {runtime: 5}", "evaluate: {runtime: soon}", 10, "jobs.evaluate.runtime"),
        ("gpu: 1", "gpu: h100", 9, "jobs.train.gpu: 'h100' is no number of GPUs: write 4 or, with a type, h100:4"),
        ("gpu: 1", "gpu: -1", 9, "jobs.train.gpu: -1 is no number of GPUs"),
        ("launcher: slurm", "launcher: pbs", 1, "launcher: Input should be 'local' or 'slurm', got 'pbs'"),
        ("  evaluate: {runtime: 5}\n", "", 3, "key jobs.evaluate is missing"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(tmp_path, old, new, line, sentence):
    with pytest.raises(UserError, match=rf"mine\.yaml:{line}: {re.escape(sentence)}"):
        cluster(tmp_path, old, new)


def test_slurm_trainings_need_a_runtime(tmp_path):
    with pytest.raises(UserError, match=r"jobs\.train\.runtime \(minutes\) is missing"):
        cluster(tmp_path, "runtime: 60, ", "")
    cluster(tmp_path, "launcher: slurm", "launcher: local\nsetup: []").jobs.train.runtime  # noqa: B018


@pytest.mark.parametrize(
    ("minutes", "seconds", "fits"), [(1, 1, False), (3, 120, False), (3, 119, True), (4, 120, True)]
)
def test_the_warning_before_the_time_limit_leaves_time_to_train(minutes, seconds, fits):
    def made():
        return values({"runtime": minutes}, training={"signal_seconds": seconds})

    if fits:
        assert made().training.signal_seconds == seconds
    else:
        with pytest.raises(ValueError, match=f"signal_seconds {seconds} leaves no time .* {minutes} min"):
            made()


@pytest.mark.parametrize(
    ("gpu", "processes", "expected"),
    [(None, 0, 1), (0, 0, 1), (1, 0, 1), (4, 0, 4), ("0", 0, 1), ("h100:4", 0, 4), ("h100:4", 2, 2), (None, 3, 3)],
)
def test_processes_follow_the_gpus_unless_they_are_given(gpu, processes, expected):
    assert values({"gpu": gpu}, training={"processes": processes}).processes == expected


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_graphs_are_for_one_process_on_a_gpu(launcher):
    graphs = {"graphs": True}
    assert values({"gpu": 1, "device": "cuda"}, launcher=launcher, training=graphs).training.graphs
    for job, training in [({"gpu": None, "device": "cpu"}, {}), ({"gpu": 2}, {}), ({"gpu": 1}, {"nodes": 2})]:
        with pytest.raises(ValueError, match=r"training\.graphs is for one process on one GPU"):
            values(job, launcher=launcher, training={**graphs, **training})


@pytest.mark.parametrize(
    ("setup", "container", "expected"),
    [
        ([], "", "python"),
        (["module load cuda", ". env"], "", "module load cuda && . env && python"),
        ([], "apptainer exec x.sif", "apptainer exec x.sif python"),
        (["module load a"], "apptainer exec x.sif", "module load a && apptainer exec x.sif python"),
    ],
)
def test_a_stateless_job_starts_with_the_setup_then_the_container(setup, container, expected):
    assert values(setup=setup, container=container).command() == expected


def test_a_training_job_uses_this_python_or_the_containers():
    assert values().python == shlex.quote(sys.executable)
    assert values(container="apptainer exec x.sif").python == "apptainer exec x.sif python"


def test_an_unknown_cluster_names_the_nearest_one(tmp_path):
    cluster(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*mien\.yaml, did you mean mine\?"):
        load_cluster("mien", tmp_path)
    with pytest.raises(UserError, match="known: mine"):
        load_cluster("elsewhere", tmp_path)
