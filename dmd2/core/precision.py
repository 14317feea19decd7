"""The floating-point arithmetic of networks: a named setting, never what a process or a GPU happens to allow.

On a GPU PyTorch computes some float32 products (matrix products, convolutions) in TF32, with ten bits of mantissa,
unless told otherwise, and uses kernels whose order of summation changes from run to run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import backends

# Every place where PyTorch decides how float32 operands are multiplied: those of a GPU, then those of a CPU.
_cudnn: Any = backends.cudnn  # PyTorch's types leave these attributes out
_mkldnn: Any = backends.mkldnn
GPU_PRODUCTS: tuple[Any, ...] = (backends.cuda.matmul, _cudnn.conv, _cudnn.rnn)
CPU_PRODUCTS: tuple[Any, ...] = (_mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 products in IEEE float32 for ``fp32``, and in TF32 on a GPU for every other precision.

    A CPU has no TF32 and always computes in float32. The process's earlier setting is restored afterwards.
    """
    before = [(place, place.fp32_precision) for place in GPU_PRODUCTS + CPU_PRODUCTS]
    try:
        for place in CPU_PRODUCTS:
            place.fp32_precision = "ieee"
        for place in GPU_PRODUCTS:
            place.fp32_precision = "ieee" if precision == "fp32" else "tf32"
        yield
    finally:
        for place, value in before:
            place.fp32_precision = value


@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 on `device`, without TF32 and autocast."""
    with float32_products("fp32"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """If wanted, use only kernels that give the same bits for the same input (convolution, attention, cuBLAS, scatter).

    An operation without such a kernel raises RuntimeError. Enter it before the first product on the GPU, because cuBLAS
    reads its environment variable once.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        backends.cudnn.benchmark = False  # the fastest of several kernels is not the same one every time
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        backends.cudnn.benchmark = benchmark
