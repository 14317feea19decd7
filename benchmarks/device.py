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


def runtime_calls(body: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """What the host asked of the GPU, by PyTorch's profiler, and milliseconds of the GPU by the name of its work.

    Of the first, ``launches`` are kernels, copies, fills and whole graphs; ``kernels`` what the GPU ran, in graphs too;
    ``waits`` are synchronisations, ``to host`` copies from the GPU; ``busy, ms`` is the sum of the second. What the
    profiler itself does is taken away.
    """
    (nothing, _), (calls, busy) = _profiled(lambda: None), _profiled(body)
    return Counter({name: value - nothing[name] for name, value in calls.items()}), busy


def _profiled(body: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        body()
        synchronize()
    calls, busy = Counter[str](), Counter[str]()
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == DeviceType.CUDA and not getattr(event, "is_user_annotation", lambda: False)():
            calls["kernels"] += not name.startswith(COPIES)
            calls["to host"] += name.startswith("Memcpy DtoH")
            busy[name] += event.duration_ns() / 1e6
        calls["launches"] += name.startswith(LAUNCHES)
        calls["waits"] += name.startswith(WAITS)
    calls["busy, ms"] = busy.total()
    return calls, busy


def matrix_rate() -> float:
    """Floating-point operations per second of large products, bfloat16 on a GPU and float32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    side, times = (8192, 20) if on_gpu else (512, 5)
    kind, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    a, b = (torch.randn(side, side, dtype=kind, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    return times * 2 * side**3 / seconds(lambda: [a @ b for _ in range(times)])
