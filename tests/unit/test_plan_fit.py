"""What `plan` says of rows that do not fit a GPU, of text sets on disk, and of the host memory that is asked for."""

import json

import pytest

from dmd2.experiment.cluster import Cluster
from dmd2.experiment.tables import load_base
from dmd2.planning import host_memory as host
from dmd2.planning.plan import Counts, Disk
from tests import tiny
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


def test_latents_are_priced_as_float16_with_their_text_states():
    _, cfg = load_base("sdxl")
    counted = Counts().of(cfg)
    row = 77 * 2048 * 2 + 1280 * 2 + 6 * 4
    assert host.condition_bytes(counted) == row
    assert host.image_bytes(cfg) == 4 * 128 * 128 * 2
    plain = config()
    assert host.condition_bytes(Counts().of(plain)) == 8 and host.image_bytes(plain) == tiny.SIZE**2


def test_pairs_of_text_are_priced_with_their_text_states():
    _, cfg = load_base("sdxl")
    weighted = cfg.model_copy(update={"regression": cfg.regression.model_copy(update={"weight": 1.0})})
    disk = Disk.of(weighted, Counts().of(weighted))
    each = 2 * 4 * 4 * 128 * 128 + 77 * 2048 * 2 + 1280 * 2 + 6 * 4
    assert disk.pairs == cfg.regression.pairs.count * each


def test_host_memory_of_a_node_of_gpus_is_that_of_its_processes_and_one_snapshot():
    counted = Counts().of(config())
    eight = cluster({"gpu": 8, "mem_mb": 20000})
    found = host.Host.of(counted, eight, peak=10**15)
    assert found.processes == 8 * 3 * 2**30 and found.saving == 4 * counted.parameters["student"]
    assert "Too small: jobs.train asks for 20000 MB" in host.told(found, eight, "slurm")
    enough = cluster({"gpu": 8, "mem_mb": found.megabytes})
    assert "Too small" not in host.told(found, enough, "slurm")
    assert host.asked(cluster({"gpu": 8, "threads": 2, "mem_mb_per_cpu": 1000})) == 16000
    assert "Too small" not in host.told(found, cluster({"gpu": 8}), "slurm")


def test_host_memory_on_cpus_and_of_split_networks():
    counted = Counts().of(config())
    assert host.Host.of(counted, cluster({}), peak=5e9).processes == 2**30 + 5e9
    split = host.Host.of(counted, cluster({"gpu": 4}, shard=True, nodes=2), 0).saving
    state = 4 * sum(counted.parameters[name] for name in ("student", "critic", "head")) + counted.moments
    assert split == -(-state // 2)


def test_the_page_marks_the_memory_of_the_cluster_file(page, tmp_path):  # noqa: F811
    (tmp_path / "workflow/cluster").mkdir()
    jobs = {**{kind: {} for kind in KINDS}, "train": {"gpu": 8, "mem_mb": 1000}}
    (tmp_path / "workflow/cluster/slurm.yaml").write_text(json.dumps({"launcher": "local", "jobs": jobs}))
    code, text = page("tiny")
    assert code == 0 and "asks for 1000 MB" in " ".join(text.split())
    assert "there is no workflow/cluster/mine.yaml" in " ".join(page("tiny", "--cluster", "mine")[1].split())
