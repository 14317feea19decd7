"""NVlabs' pickles are read as data: what a pickle may not do, and what is said of a file that is not whole."""

import codecs
import io
import math
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dmd2.convert.edm_pickle import read_edm, read_pickle
from dmd2.core.errors import UserError
from dmd2.data.inert_pickle import Record
from tests import edm_reference as edm

STATE = edm.random_state(edm.VP, augment=9)


@pytest.fixture
def source(tmp_path):
    return edm.write(tmp_path / "net.pkl", edm.VP, STATE)


def refused(tmp_path, data, match):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=match) as caught:
        read_pickle(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_tensors_and_settings_come_out_of_every_protocol(tmp_path, protocol):
    said, state = read_edm(edm.write(tmp_path / "net.pkl", edm.VP, STATE, protocol))
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert said == {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 3, "label_dim": 5}


def test_plain_values_are_those_of_pickle(tmp_path):
    value = {
        "a": [1, -(2**40), 2.5, True, None, "é", b"\0\xff", (), (1,), (1, 2, 3, 4)],
        3: {"x", 1},
        "e": [],
        "i": math.inf,
    }
    for protocol in range(6):
        (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, protocol))
        assert read_pickle(tmp_path / "v.pkl") == value
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([np.float64(0.1), np.int64(-3), np.bool_(True)]))
    assert read_pickle(tmp_path / "v.pkl") == [0.1, -3, True]
    older = pickle.dumps(np.float64(0.1), 2).replace(b"numpy._core", b"numpy.core")  # before numpy 2
    (tmp_path / "v.pkl").write_bytes(older)
    assert read_pickle(tmp_path / "v.pkl") == 0.1


def test_classes_become_records_and_their_source_is_not_run(tmp_path):
    path = tmp_path / "v.pkl"
    with edm.names_of_nvlabs():
        path.write_bytes(pickle.dumps(edm.Persistent("Thing", a=1)))  # its source text would end the process
    assert read_pickle(path) == Record("Thing", {"a": 1})


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_by_name_and_not_made(tmp_path, protocol):
    mark = tmp_path / "ran"
    refused(
        tmp_path, pickle.dumps({"ema": Call(os.system, f"touch {mark}")}, protocol), r"would run \w+\.system: refused"
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"cos\nsystem\n.", "would run os.system"),
        (b"(ios\nsystem\n.", "would run os.system"),
        (b"(cos\nsystem\nS'x'\no.", "would run os.system"),
        (b"(icollections\nOrderedDict\n.", "INST"),
        (b"(ccollections\nOrderedDict\no.", "OBJ"),
        (b"\x80\x04\x8c\x05torch\x8c\x0c_C._get_what\x93.", "would run torch._C._get_what"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "would run builtins.getattr"),
        (b"\x80\x04\x8c\x12torch.nn.modules.x\x8c\x08Foo.eval\x93.", "would run torch.nn.modules.x.Foo.eval"),
        (b"\x80\x04]]\x93.", "STACK_GLOBAL requires str"),
        (b"\x80\x04\x8c\x01a\x8c\x03b\nc\x93.", r"would run a.b\\nc"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pname\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"ccollections\nOrderedDict\n}b.", "would set the state of a Name"),
        (b"\x80\x02]}b.", "would set the state of a list"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)R.", "would call torch.nn.modules.container.ModuleDict"),
        (b"\x80\x02ctorch.nn.modules.container\nModuleDict\nK\x01\x85\x81.", "in a way we do not know"),
        (b"\x80\x02c_codecs\nencode\n)\x81.", "would make a _codecs.encode"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0rot_\x86R.", "encode text as rot_"),
        (b"\x80\x02}))s.", "container as key"),
        (b"\x80\x02}K\x01a.", "no attribute 'append'"),
        (b"\x80\x04}(K\x01\x90.", "would add to a dict"),
    ],
)
def test_tricks_with_opcodes_are_refused(tmp_path, code, said):
    assert [op.name for op, _, _ in pickletools.genops(code)][-1] == "STOP"
    refused(tmp_path, code, said)


def nested(kind, depth=200):
    """A container whose text, hash or copy has no end: each level holds the one below twice."""
    value = kind()
    for _ in range(depth):
        value = kind([value, value])
    return value


PREFIX = b"\x80\x04"
BOMBS = {
    "a memo of 34 GB": PREFIX + b"Nr\xff\xff\xff\x7f.",
    "bytes of 64 GB": PREFIX + b"\x8e" + struct.pack("<Q", 1 << 36) + b"x.",
    "text of 64 GB": PREFIX + b"\x8d" + struct.pack("<Q", 1 << 36) + b"x.",
    "a bytearray of 64 GB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x.",
    "a frame of 64 GB": PREFIX + b"\x95" + struct.pack("<Q", 1 << 36) + b"N.",
    "a number of 2 GB": PREFIX + b"\x8b\xff\xff\xff\x7f1.",
    "a key without end": pickle.dumps({"a": Call(OrderedDict, [(nested(tuple), 1)])}),
    "an item without end": pickle.dumps(Call(set, [nested(tuple)])),
    "an encoding without end": pickle.dumps(Call(codecs.encode, "a", nested(list))),
    "a class without end": pickle.dumps(nested(list))[:-1] + b")\x81.",
    "a type without end": pickle.dumps(Call(np._core.multiarray.scalar, Call(np.dtype, nested(tuple)), b"")),
    "a function without end": pickle.dumps(nested(list))[:-1] + b")R.",
    "a function with attributes": b"\x80\x02c_codecs\nencode\n}X\x04\0\0\0nameX\x01\0\0\0xs\x86b.",
    "attributes in slots": b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81N}X\x04\0\0\0kindX\x01\0\0\0xs\x86b.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_neither_memory_nor_time(tmp_path, name):
    path = tmp_path / "file.pkl"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        if "memo" in name or "frame" in name:  # which are hints and keep nothing
            assert read_pickle(path) is None
        else:
            with pytest.raises(UserError, match="refused|truncated or no pickle"):
                read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def rebuilt(storage, *args):
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, storage, *args))


STORAGE = torch.arange(6.0).untyped_storage()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((0, (7,), (1,)), "outside of its storage"),
        ((2, (2, 3), (3, 1)), "outside of its storage"),
        ((0, (10**9, 10**9), (0, 0)), "outside of its storage"),
        ((0, (-1,), (1,)), "impossible shape"),
        ((-1, (2,), (1,)), "impossible shape"),
        ((0, (2,), (-1,)), "impossible shape"),
        ((0, (2.0,), (1,)), "impossible shape"),
        ((0, (2**60,), (1,)), "impossible shape"),
    ],
)
def test_a_tensor_must_lie_in_its_storage(tmp_path, args, said):
    typed = torch.storage.TypedStorage(wrap_storage=STORAGE, dtype=torch.float32, _internal=True)
    refused(tmp_path, rebuilt(typed, *args, False, {}), said)


def test_tensors_with_hooks_or_without_a_storage_are_refused(tmp_path):
    typed = torch.storage.TypedStorage(wrap_storage=STORAGE, dtype=torch.float32, _internal=True)
    refused(tmp_path, rebuilt(typed, 0, (2,), (1,), False, {"hook": 1}), "with hooks")
    refused(tmp_path, rebuilt([1.0, 2.0], 0, (2,), (1,), False, {}), "impossible shape")
    refused(tmp_path, pickle.dumps(Call(torch._utils._rebuild_parameter, 3, False, {})), "parameter")


def test_what_hides_inside_a_storage_is_refused_too(tmp_path):
    inner = io.BytesIO()
    torch.save(Call(os.system, "touch ran"), inner, _use_new_zipfile_serialization=False)
    refused(
        tmp_path, pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue())), r"would run \w+\.system inside"
    )
    inner = io.BytesIO()
    torch.save({"a": 1}, inner, _use_new_zipfile_serialization=False)
    refused(tmp_path, pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue())), "storage that is none")
    inner = io.BytesIO()
    torch.save(torch.ones(2), inner)
    refused(tmp_path, pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue())), "unknown form")


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.999])
def test_a_truncated_file_is_told(source, tmp_path, kept):
    data = source.read_bytes()
    refused(tmp_path, data[: int(len(data) * kept)], "truncated or no pickle")


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>Not found</html>", b"\x80\x04", b"\x80\x09N.", b".", b"\x80\x02h\x05.", b"\x80\x02\x85.", b"\x80\x02t.",
     b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60) + b"x.", b"\x80\x04\x8b\xff\xff\xff\x7f1."],
)  # fmt: skip
def test_what_is_no_pickle_is_told(tmp_path, data):
    refused(tmp_path, data, "truncated or no pickle")


def test_a_zip_and_a_missing_file_are_told(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "file.pkl")
    refused(tmp_path, (tmp_path / "file.pkl").read_bytes(), "zip archive")
    with pytest.raises(UserError, match="No such file"):
        read_pickle(tmp_path / "absent.pkl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": ("ema",)}, "no key ema: it holds loss_fn, augment_pipe, dataset_kwargs"),
        ({"kind": "VPPrecond"}, "ema is a VPPrecond, which we cannot convert"),
        ({"kind": "VEPrecond"}, "ema is a VEPrecond, which we cannot convert"),
        ({"kind": "iDDPMPrecond"}, "ema is a iDDPMPrecond, which we cannot convert"),
        ({"sigma_data": 0.6}, "ema.sigma_data is 0.6"),
    ],
)
def test_another_file_of_nvlabs_is_told(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        read_edm(edm.write(tmp_path / "net.pkl", edm.VP, STATE, **options))


def test_a_network_of_another_class_is_told(tmp_path):
    with pytest.raises(UserError, match=r"ema.model is a MyUNet, .* only DhariwalUNet or SongUNet"):
        read_edm(edm.write(tmp_path / "net.pkl", {**edm.VP, "model": "MyUNet"}, STATE))


def test_a_network_that_computes_something_else_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(edm.np, "sqrt", lambda value: 0.9)
    with pytest.raises(UserError, match=r"_block0.skip_scale is 0.9, in EDM's SongUNet it is 0.707"):
        read_edm(edm.write(tmp_path / "net.pkl", edm.VP, STATE))


def test_a_file_that_holds_no_dict_is_told(tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="holds a list"):
        read_edm(tmp_path / "net.pkl")


def test_a_module_within_itself_is_told(tmp_path):
    with edm.names_of_nvlabs():
        network = edm.tree(edm.VP, {name.removeprefix("model."): tensor for name, tensor in STATE.items()})
        network.meta["state"]["_modules"]["again"] = network.meta["state"]["_modules"]["enc"]
        ema = edm.module("EDMPrecond", {}, {"model": network})
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": ema}))
    with pytest.raises(UserError, match="no module of its own"):
        read_edm(tmp_path / "net.pkl")
