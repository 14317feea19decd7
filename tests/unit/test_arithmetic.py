"""Precision and determinism are what the settings say, whatever the process allows."""

import torch
from torch import backends

from dmd2.core.precision import deterministic_kernels, float32_products, strict_float32

CPU = torch.device("cpu")


def allowed() -> tuple[str, str, str]:
    """How float32 matrix products and convolutions of a GPU, and products of a CPU, would be computed now."""
    return tuple(place.fp32_precision for place in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul))


def test_products_are_what_the_precision_says_and_the_process_gets_its_own_back(loose_process):
    before = allowed()
    assert before[0] == "tf32"
    with float32_products("fp32"):
        assert allowed() == ("ieee", "ieee", "ieee")
        with float32_products("bf16"):
            assert allowed() == ("tf32", "tf32", "ieee")
        assert allowed() == ("ieee", "ieee", "ieee")
    assert allowed() == before
    assert backends.cuda.matmul.allow_tf32 and backends.cudnn.allow_tf32  # readable again by PyTorch's older names


def test_strict_float32_is_out_of_reach_of_an_autocast_around_it():
    a = torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16), strict_float32(CPU):
        strict = a @ a
    assert strict.dtype == torch.float32
    assert torch.equal(strict, a @ a)


def test_deterministic_kernels_are_asked_for_inside_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    backends.cudnn.benchmark = True
    try:
        with deterministic_kernels(False):
            assert not torch.are_deterministic_algorithms_enabled() and backends.cudnn.benchmark
        with deterministic_kernels(True):
            assert torch.are_deterministic_algorithms_enabled() and not backends.cudnn.benchmark
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.are_deterministic_algorithms_enabled() and backends.cudnn.benchmark
    finally:
        backends.cudnn.benchmark = False
