"""What `plan` says of rows that do not fit a GPU, of text sets on disk, and of the host memory that is asked for."""

import json

import pytest

from dmd2.experiment.cluster import Cluster
from dmd2.experiment.tables import load_base
from dmd2.planning import plan
from dmd2.planning.memory import Counted
from dmd2.planning.page import MB, plan_page
from dmd2.planning.plan import Plan, disk_of, host_memory, requested_memory
from dmd2.planning.rates import Rate
from tests import tiny
from tests.conftest import ROOT
from tests.unit.test_memory import config
from tests.unit.test_plan import page  # noqa: F401, a fixture

KINDS = ("real_data", "encode", "detector", "reference", "teacher", "pairs", "evaluate")


def cluster(train, **training):
    return Cluster.model_validate({"launcher": "local", "jobs": {**{kind: {} for kind in KINDS}, "train": train},
                                   "training": training})  # fmt: skip


@pytest.mark.parametrize(("card", "code", "words"), [(None, 0, []), ("80", 0, ["on 80 GiB", "fits"]),
                                                     ("2", 1, ["on 2 GiB", "DOES NOT FIT", "full, dmd of table both does not fit"])])  # fmt: skip
def test_a_row_that_does_not_fit_is_marked_by_a_word_and_by_the_exit(page, card, code, words):  # noqa: F811
    found, text = page("tiny", "--table", "both", *([] if card is None else ["--gpu-memory", card]))
    assert found == code, text
    assert all(word in " ".join(text.split()) for word in words)


def test_text_sets_are_priced_as_float16_with_their_text_states(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no set is
    cfg = load_base("sdxl", ROOT / "workflow/base")
    monkeypatch.setattr(plan, "PUBLISHED_IMAGES", {cfg.data.name: 10, config().data.name: 10})
    weighted = cfg.model_copy(update={"regression": cfg.regression.model_copy(update={"weight": 1.0})})
    disk, text = disk_of(weighted, Counted(weighted)), 77 * 2048 * 2 + 1280 * 2 + 6 * 4
    assert disk.real == 10 * (4 * 128 * 128 * 2 + text)
    assert disk.pairs == cfg.regression.pairs.count * (2 * 4 * 4 * 128 * 128 + text)
    assert disk_of(config(), Counted(config())).real == 10 * (tiny.SIZE**2 + 8)


def told(planned, machine):
    return plan_page("tiny", planned, 1, (), 0, ("slurm", machine))


def test_host_memory_of_a_node_of_gpus_is_that_of_its_processes_and_one_snapshot():
    planned = Plan("r", config(), Counted(config()), Rate(1.0, "GPU", "given"))
    found = host_memory(planned.counted, cluster({"gpu": 8}), peak=10**15)
    assert found == (8 * 3 * 2**30, 4 * planned.counted.parameters["student"])
    small, enough = -(-sum(found) // MB) - 1, -(-sum(found) // MB)
    assert f"jobs.train asks for {small} MB of memory of a node; set mem_mb to {enough}" in told(
        planned, cluster({"gpu": 8, "mem_mb": small})
    )
    for machine in (cluster({"gpu": 8, "mem_mb": enough}), cluster({"gpu": 8})):
        assert "Too small" not in told(planned, machine)
    assert requested_memory(cluster({"gpu": 8, "threads": 2, "mem_mb_per_cpu": 1000})) == 16000


def test_host_memory_on_cpus_and_of_split_networks():
    counted = Counted(config())
    assert host_memory(counted, cluster({}), peak=5e9)[0] == 2**30 + 5e9
    _, split = host_memory(counted, cluster({"gpu": 4}, shard=True, nodes=2), 0)
    state = 4 * sum(counted.parameters[name] for name in ("student", "critic", "head")) + counted.moments
    assert split == -(-state // 2)


def test_the_page_marks_the_memory_of_the_cluster_file(page, tmp_path):  # noqa: F811
    (tmp_path / "workflow/cluster").mkdir()
    jobs = {**{kind: {} for kind in KINDS}, "train": {"gpu": 8, "mem_mb": 1000}}
    (tmp_path / "workflow/cluster/slurm.yaml").write_text(json.dumps({"launcher": "local", "jobs": jobs}))
    code, text = page("tiny")
    assert code == 0 and "asks for 1000 MB" in " ".join(text.split())
    assert "there is no workflow/cluster/mine.yaml" in " ".join(page("tiny", "--cluster", "mine")[1].split())
