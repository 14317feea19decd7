"""Rows of tensors, written by some processes, are put together for any number of others."""

import pytest
import torch
from torchao.optim.subclass_8bit import OptimState8bit

from dmd2.training.checkpoints.parts import cut, flat, nested, read_parts, write_part

WEIGHT, SCALAR = torch.randn(7, 3), torch.tensor(5.0)
MOMENT = torch.randn(64, 256)


def whole(rows):
    """The tensor that the pieces are of."""
    return torch.cat(rows) if isinstance(rows, tuple) else rows


def eight(tensor):
    """The 8-bit state of a moment, as an optimiser packs it."""
    if len(tensor) == 0:
        return tensor, tensor  # too small to be quantised
    state = OptimState8bit.zeros(tensor.shape)
    state.copy_(tensor)
    return {"codes": state.codes, "scale": state.scale}, state.dequantize()


def written(folder, ends):
    """Parts of processes whose rows end there, the same share of the moment, and the dequantised moment."""
    paths, seen, previous = [], [], (0, 0)
    for number, end in enumerate(ends):
        last = 64 * end // 7
        packed, floats = eight(MOMENT[previous[1] : last])
        state = {"net": {"w.x": WEIGHT[previous[0] : end]}, "opt": {"state": {3: {"exp_avg": packed, "step": SCALAR}}}}
        spans = {"net/w.x": (previous[0], end), "opt/state/3": (previous[1], last)}
        paths.append(folder / f"{number}.safetensors")
        write_part(paths[-1], state, spans, whole=number == 0)
        seen.append(floats)
        previous = (end, last)
    return paths, torch.cat(seen)


@pytest.mark.parametrize("ends", [(4, 7), (7, 7), (1, 2, 7)])
@pytest.mark.parametrize("asked", [(0, 4), (4, 7), (2, 5), (7, 7), (0, 7)])
def test_any_rows_are_found_in_any_parts(tmp_path, ends, asked):
    paths, floats = written(tmp_path, ends)
    rows = (64 * asked[0] // 7, 64 * asked[1] // 7)
    state = nested(read_parts(paths, {"net/w.x": asked, "opt/state/3": rows}))
    assert torch.equal(whole(state["net"]["w.x"]), WEIGHT[slice(*asked)])
    moment = state["opt"]["state"][3]
    assert moment["step"] == 5
    if isinstance(moment["exp_avg"], dict):
        assert asked in [(0, 4), (4, 7), (0, 7), (7, 7)]
    else:
        assert torch.equal(whole(moment["exp_avg"]), floats[slice(*rows)])


def test_the_same_rows_keep_their_codes(tmp_path):
    paths, _ = written(tmp_path, (4, 7))
    found = read_parts(paths, {"opt/state/3": (36, 64)})["opt/state/3/exp_avg"]
    expected, _ = eight(MOMENT[36:])
    assert torch.equal(found["codes"], expected["codes"])
    assert torch.equal(found["scale"], expected["scale"])


def test_without_spans_the_whole_is_read(tmp_path):
    paths, floats = written(tmp_path, (4, 7))
    found = read_parts(paths)
    assert torch.equal(whole(found["net/w.x"]), WEIGHT)
    assert torch.equal(whole(found["opt/state/3/exp_avg"]), floats)


def test_rows_are_cut_from_a_whole_state():
    packed, floats = eight(MOMENT)
    state = {"net": {"w": WEIGHT}, "opt": {"state": {0: {"exp_avg": packed, "step": SCALAR}}}, "step": 3}
    found = cut(state, {"net/w": (2, 4), "opt/state/0": (10, 20)})
    assert torch.equal(found["net"]["w"], WEIGHT[2:4])
    assert torch.equal(found["opt"]["state"][0]["exp_avg"], floats[10:20])
    assert (found["opt"]["state"][0]["step"], found["step"]) == (SCALAR, 3)


def test_paths_and_trees():
    tree = {"a": {"0.weight": 1, 0: {"x": 2}}, "b": [1, 2]}
    assert dict(flat(tree)) == {"a/0.weight": 1, "a/0/x": 2, "b": [1, 2]}
    assert nested(dict(flat(tree))) == tree
