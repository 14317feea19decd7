"""Teacher pairs of the regression: addressed by seed, so that sharding changes nothing."""

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_noise
from dmd2.data.sets import load_set
from dmd2.networks.condition import Condition
from dmd2.training.pairs import FIRST_SEED, join_shards, make_shard, shard_seeds
from dmd2.training.teachers import load_teacher
from tests import reference, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.teacher(tmp_path_factory.mktemp("teacher"))


def pair_config(**changes):
    return tiny.config("edm", regression__weight=1.0, **changes)


def made(teacher, folder, shards, **changes):
    cfg = pair_config(regression__pairs__shards=shards, **changes)
    parts = [folder / f"shard-{i}.json" for i in range(shards)]
    for i, part in enumerate(parts):
        make_shard(cfg, teacher, i, part)
    join_shards(parts, folder / "manifest.json")
    return load_set(folder / "manifest.json").tensors


@pytest.mark.parametrize(("count", "shards"), [(16, 1), (16, 3), (25000, 25), (7, 7)])
def test_every_seed_lies_in_exactly_one_shard(count, shards):
    parts = [shard_seeds(count, shards, i) for i in range(shards)]
    assert [seed for part in parts for seed in part] == list(range(FIRST_SEED, FIRST_SEED + count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_pairs_do_not_depend_on_the_number_of_shards(teacher, tmp_path):
    one, three = (made(teacher, tmp_path / str(n), n) for n in (1, 3))
    assert torch.equal(one["noise"], three["noise"])
    assert torch.equal(one["labels"], three["labels"])
    torch.testing.assert_close(one["images"], three["images"], rtol=1e-4, atol=1e-4)


def test_an_image_is_the_teachers_heun_sample_of_its_noise_and_label(teacher, tmp_path):
    pairs, denoiser = made(teacher, tmp_path, 1), load_teacher(teacher, "edm")

    def denoise(x, sigma):
        t = torch.full((len(x),), float(sigma))
        return denoiser(torch.from_numpy(x).float(), t, Condition(labels=pairs["labels"])).double().numpy()

    with torch.no_grad():
        expected = reference.heun(denoise, pairs["noise"].double().numpy(), steps=4)
    torch.testing.assert_close(pairs["images"].double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)


def test_noise_is_unit_normal_and_belongs_to_the_seed(teacher, tmp_path):
    pairs = made(teacher, tmp_path, 2)
    assert torch.equal(pairs["noise"][3:5], sample_noise([FIRST_SEED + 3, FIRST_SEED + 4], (1, 8, 8), "noise"))


def test_pair_seeds_are_never_those_of_evaluation():
    assert FIRST_SEED > 10_000_000


def test_a_changed_shard_is_named_when_shards_are_joined(teacher, tmp_path):
    made(teacher, tmp_path, 2)
    shard = tmp_path / "shard-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"shard-1\.safetensors does not match"):
        join_shards([tmp_path / "shard-0.json", tmp_path / "shard-1.json"], tmp_path / "manifest.json")
