"""What benchmarks on a GPU ask of it: time, peak memory, launches, waits of the host, its rate in bfloat16."""

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COPIES = ("Memcpy", "Memset")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(body: Callable[[], object]) -> float:
    """Wall-clock seconds of `body`, with what it left the GPU to do."""
    synchronize()
    started = time.perf_counter()
    body()
    synchronize()
    return time.perf_counter() - started


def name_of_device() -> str:
    """The card, or how many threads of a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def runtime_calls(body: Callable[[], object]) -> Counter[str]:
    """How often the host launched something on the GPU and how often it waited, by PyTorch's profiler.

    ``launches`` are kernels, copies, fills and whole graphs; ``kernels`` what the GPU ran, in graphs too; ``waits`` are
    synchronisations, ``to host`` copies from the GPU. What the profiler itself does is taken away.
    """
    found: list[Counter[str]] = []
    for run in (lambda: None, body):
        synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        calls: Counter[str] = Counter()
        for event in profiler.profiler.kineto_results.events():
            name, on_gpu = event.name(), event.device_type() == DeviceType.CUDA
            marked = getattr(event, "is_user_annotation", lambda: False)()
            calls["kernels"] += on_gpu and not marked and not name.startswith(COPIES)
            calls["launches"] += name.startswith(LAUNCHES)
            calls["waits"] += name.startswith(WAITS)
            calls["to host"] += name.startswith("Memcpy DtoH")
        found.append(calls)
    return Counter({name: found[1][name] - found[0][name] for name in found[1]})


def matrix_rate() -> float:
    """Floating-point operations per second of large products, bfloat16 on a GPU and float32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    side, times = (8192, 20) if on_gpu else (512, 5)
    kind, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    a, b = (torch.randn(side, side, dtype=kind, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    return times * 2 * side**3 / seconds(lambda: [a @ b for _ in range(times)])
