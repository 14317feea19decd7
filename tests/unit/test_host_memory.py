"""Networks and checkpoints stay mapped from their files until they are copied, once, to where they are trained."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd2.core.rng import stream
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import Inputs
from dmd2.networks.condition import Condition
from dmd2.networks.lora import add_lora
from dmd2.networks.song_unet import SongUNet
from dmd2.planning.iteration_shapes import META
from dmd2.planning.ledger import Ledger
from dmd2.training.build import build_models
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.optimiser import Optimiser
from dmd2.training.sharding import load_local, materialise
from dmd2.training.teachers import load_teacher, stored_dtype
from tests import tiny

MIB = 1 << 20
LARGE = {"block_out_channels": (64, 512)}  # 64 MiB
in_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def anonymous_mib():
    """Memory of this process that no file backs."""
    gc.collect()
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def teacher_in(folder, kind, dtype=torch.float32, **changes):
    tiny.KINDS[kind][1](**{**tiny.KINDS[kind][2], **changes}).to(dtype).save_pretrained(folder / "unet")
    return adopt_teacher(Teacher(name="t", parameterisation=tiny.KINDS[kind][0], guidance=1.0), folder)


@in_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_take_no_host_memory_before_they_are_placed(tmp_path, dtype):
    """Whatever their file holds: large ones are published in 16 bits."""
    manifest, grown, sizes = teacher_in(tmp_path, "edm", dtype, **LARGE), [], []
    before = anonymous_mib()

    def place(name, network, *_):
        grown.append(anonymous_mib() - before)
        sizes.append(sum(p.nbytes for p in network.parameters()) / MIB)

    build_models(tiny.config("edm"), 0, Inputs(manifest, None, None, None), torch.device("cpu"), place)
    assert min(sizes[:3]) > 12 * dtype.itemsize
    assert max(grown) < 24  # three copies in memory are 190


@pytest.mark.parametrize("kind", ["edm", "eps-sdxl", "flow-sd3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_16_bits_is_trained_in_float32(tmp_path, kind, dtype):
    """Another file beside its own, such as one that git did not fetch, is not looked at."""
    manifest, cfg = teacher_in(tmp_path, kind, dtype), tiny.config(kind, optim__ema=0.9)
    (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    assert stored_dtype(manifest) == dtype
    m = build_models(cfg, 0, Inputs(manifest, None, None, None), torch.device("cpu"))
    plain = load_teacher(manifest, tiny.KINDS[kind][0])
    for denoiser in (m.teacher, m.student, m.critic):
        state = denoiser.network.state_dict()
        assert all(torch.equal(state[name].float(), value) for name, value in plain.network.state_dict().items())
        assert {t.dtype for t in (*denoiser.parameters(), *denoiser.buffers())} <= {torch.float32}


def test_frequencies_of_a_teacher_in_16_bits_are_those_of_its_evaluation(tmp_path):
    """NCSN++ takes sines of a buffer, whose products must not be rounded."""
    network = SongUNet(8, 1, 1, 8, (8,), 1, embedding_type="fourier", num_class_embeds=3)
    network.to(torch.bfloat16).save_pretrained(tmp_path / "unet")
    manifest = adopt_teacher(Teacher(name="t", parameterisation="edm", guidance=1.0), tmp_path)
    one, other = load_teacher(manifest, "edm"), load_teacher(manifest, "edm", as_stored=True)
    materialise(other, torch.device("cpu"), torch.float32)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0])
    cond = Condition(labels=torch.tensor([0, 1]))
    assert torch.equal(one(x, t, cond), other(x, t, cond))


@in_linux
def test_a_checkpoint_takes_no_host_memory_before_it_is_copied(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"student": {"w": torch.ones(16, MIB)}, "step": 1})
    before = anonymous_mib()
    state = checkpoints.load_latest()
    assert float(state["student"]["w"].mean()) == 1
    assert anonymous_mib() - before < 24  # of 64


def stepped(device="cpu"):
    """A network and its optimiser, after an update unless it is on the meta device."""
    with torch.device(device):
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    optimiser = Optimiser([network], tiny.config("edm").optim, 1e-3)
    if device == "cpu":
        network(torch.ones(1, 64)).sum().backward()
        optimiser.step(1)
    return network, optimiser


def moments(optimiser):
    return [value for state in optimiser.adamw.state.values() for value in state.values()]


def test_a_resume_makes_each_moment_once_on_the_device_and_nothing_else(tmp_path):
    network, optimiser = stepped()
    Checkpoints(tmp_path).save(1, {"net": network.state_dict(), "opt": optimiser.state_dict()})
    state = Checkpoints(tmp_path).load(1)
    twin, other = stepped(META)
    with Ledger([*twin.parameters()]) as ledger:
        load_local(twin, state["net"])
        assert ledger.peak == ledger.standing  # weights are copied in place
        other.load_state_dict(state["opt"])
        made = sum(-(-moment.nbytes // 512) * 512 for moment in moments(other))
        assert ledger.peak - ledger.standing == made > 2 * sum(p.nbytes for p in twin.parameters())
        addresses = [id(moment) for moment in moments(other)]
        other.load_state_dict(state["opt"])  # into moments that are there
        assert ledger.peak - ledger.standing == made
        assert [id(moment) for moment in moments(other)] == addresses


def test_a_resumed_optimiser_has_the_saved_moments_in_memory_of_its_own(tmp_path):
    network, optimiser = stepped()
    Checkpoints(tmp_path).save(1, {"opt": optimiser.state_dict()})
    twin, other = stepped()
    other.adamw.state.clear()
    other.load_state_dict(Checkpoints(tmp_path).load(1)["opt"])
    for mine, saved in zip(moments(other), moments(optimiser), strict=True):
        assert torch.equal(mine, saved) and mine.dtype == saved.dtype and mine.device == saved.device


@pytest.mark.parametrize(
    "saved", [{"a.weight": torch.zeros(1, 2)}, {"a.weight": torch.zeros(2, 2), "b": torch.zeros(1)}, {}]
)
def test_a_state_that_does_not_fit_is_refused_and_not_spread(saved):
    module = nn.Sequential()
    module.add_module("a", nn.Linear(2, 2, bias=False))
    with pytest.raises(RuntimeError):
        load_local(module, saved)


def test_low_rank_factors_and_all_else_are_those_of_plain_copies(tmp_path):
    manifest = teacher_in(tmp_path, "eps-sdxl")
    cfg = tiny.config("eps-sdxl", generator__lora={"rank": 2, "alpha": 2.0})
    student = build_models(cfg, 3, Inputs(manifest, None, None, None), torch.device("cpu")).student
    plain = load_teacher(manifest, "eps")
    torch.manual_seed(stream("3/lora").initial_seed())
    add_lora(plain.network, 2, 2.0)
    expected, found = plain.state_dict(), student.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name.endswith("lora_A.default.weight") and value.abs().sum() > 0 for name, value in found.items())


def test_weights_that_are_trained_are_never_those_in_a_file(tmp_path):
    """Buffers included: a network that shares pages with its teacher would train it, too."""
    manifest = teacher_in(tmp_path, "edm")
    m = build_models(tiny.config("edm"), 0, Inputs(manifest, None, None, None), torch.device("cpu"))
    owners = [
        {t.untyped_storage().data_ptr() for t in (*d.parameters(), *d.buffers())}
        for d in (m.teacher, m.student, m.critic)
    ]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    with torch.no_grad():
        for p in (*m.student.parameters(), *m.critic.parameters()):
            p.fill_(7)
    assert tiny.same(tiny.weights(load_teacher(manifest, "edm")), m.teacher)
