"""What iterations of a training do, in numbers that need no GPU; run on any checkout by `benchmarks.counts`.

It uses only what the checkouts have in common. Networks of full size run on PyTorch's meta device, as `dmd2.planning`
runs them: shapes without numbers, with a GPU's autocast; AdamW does nothing there. Small ones train on the
CPU, and once more on a pretended GPU, which tells uploads and waits of the host from what the CPU does for itself.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_runs import changed, hardware, random_training, tiny_config
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import load_base, load_experiment
from dmd2.method.step import train_step
from dmd2.planning.ledger import Ledger
from dmd2.planning.memory import Counted, Setup
from dmd2.planning.plan import varied
from tests.pretended import pretended_cuda

# They launch nothing on a GPU, though PyTorch does not count them as views.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size",
          "resize_", "set_", "_local_scalar_dense", "lift_fresh", "_fused_sdp_choice"}  # fmt: skip
# The host waits until a GPU has computed what it asks for here; nothing of it can run on the meta device.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
           "is_nonzero", "repeat_interleave"}  # fmt: skip
CASTS = {"_to_copy", "copy_", "_foreach_copy_"}


class Case(NamedTuple):
    """A run of a base (by default the base itself) and how it is trained; `lora` is the rank of a student, 0 none.

    meta: on the meta device. tiny: with a small network. compiled: what PyTorch compiles (see `traced`).
    """

    base: str
    batch: int
    precision: str
    lora: int = 0
    checkpointing: bool = False
    meta: bool = True
    run: str = ""
    tiny: bool = False
    compiled: str = ""

    @property
    def config(self) -> RunConfig:
        """The configuration that is counted."""
        cfg = load_experiment().runs[self.base, self.run] if self.run else load_base(self.base)
        cfg = varied(changed(cfg, self.batch, self.precision), self.lora, None)
        return tiny_config(cfg) if self.tiny else cfg


class Counts:
    """Operations that launch kernels, bytes of results of casts, uploads, waits of the host, and samples of passes."""

    def __init__(self) -> None:
        self.kernels, self.cast, self.uploads = 0, 0, 0
        self.waits: Counter[str] = Counter()
        self.passes: dict[str, list[int]] = {}

    def operation(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Count one that PyTorch dispatched."""
        if func.namespace != "aten":
            return
        name = func.overloadpacket.__name__
        if name in WAITING and on_device(args):
            self.waits[name] += 1
        if func.is_view or name in SILENT:
            return
        self.kernels += 1
        if name in CASTS:
            targets, sources = (args[0], args[1]) if name != "_to_copy" else (out, args[0])
            for target, source in zip(tree_leaves(targets), tree_leaves(sources), strict=True):
                self.cast += target.nbytes if target.dtype != source.dtype else 0
                self.uploads += on_device(target) and not on_device(source)
                self.waits["download"] += on_device(source) and not on_device(target)

    def entered(self, who: str, half: str) -> Any:
        """A hook in front of the first or last layer of a network."""

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.passes.setdefault(f"{who} {half}", []).append(len(args[0]))

        return count

    def as_json(self) -> dict[str, Any]:
        """All of it, and what follows from the passes: how many there were and of how many samples."""
        halves = {half: [n for name, sizes in self.passes.items() if name.endswith(half) for n in sizes]
                  for half in ("encoder", "decoder")}  # fmt: skip
        return {"network passes": len(halves["encoder"]), "samples through encoders": sum(halves["encoder"]),
                "samples through decoders": sum(halves["decoder"]), "operations that launch kernels": self.kernels,
                "bytes cast": self.cast, "uploads": self.uploads, "host waits": sum(self.waits.values()),
                "passes": self.passes, "waits": dict(+self.waits)}  # fmt: skip


def on_device(values: Any) -> bool:
    """Whether any of some values is a tensor outside host memory."""
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in tree_leaves(values))


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts.operation(func, args, out)
        return out


@contextmanager
def counting_passes(models: Any, counts: Counts) -> Iterator[None]:
    """Count passes of student, teacher and critic inside."""
    with ExitStack() as stack:
        for who in ("student", "teacher", "critic"):
            denoiser = getattr(models, who)
            network = getattr(denoiser, "running", denoiser.network)  # the copy in which passes run, if there is one
            for half, layer in (("encoder", network.conv_in), ("decoder", network.conv_out)):
                stack.callback(layer.register_forward_pre_hook(counts.entered(who, half)).remove)
        yield


def on_meta(case: Case) -> dict[str, dict[str, Any]]:
    """Counts of a student and of a critic-only iteration on the meta device, with their arithmetic and peak memory."""
    counted, found = Counted(case.config, Setup(checkpointing=case.checkpointing)), {}
    plain = Ledger.__torch_dispatch__
    for kind, student in (("student", True), ("critic only", False)):
        counts = Counts()

        def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None, counts: Any = counts) -> Any:
            out = plain(self, func, types, args, kwargs)
            counts.operation(func, args, out)
            return out

        with mock.patch.object(Ledger, "__torch_dispatch__", dispatch), counting_passes(counted.models, counts):
            iteration = counted.iteration(case.batch, student)
        with _Counting(counts):  # which the optimisers that do nothing leave out
            for denoiser in [counted.models.critic, *([counted.models.student] if student else [])]:
                getattr(denoiser, "refresh", lambda: None)()
        found[kind] = {**counts.as_json(), "floating-point operations": iteration.flops, "peak bytes": iteration.peak}
    return found


def on_cpu(case: Case) -> dict[str, dict[str, Any]]:
    """Counts of a student and of a critic-only iteration that the CPU runs, optimisers included."""
    found = trained(case, "cpu")
    with pretended_cuda():  # its backward pass is none, so only what crosses to the host and back is counted there
        crossing = trained(case, "cuda")
    for kind, counts in found.items():
        counts |= {name: crossing[kind][name] for name in ("uploads", "host waits", "waits")}
    return found


def trained(case: Case, device: str) -> dict[str, dict[str, Any]]:
    """Counts of the last iteration of each kind of a short training."""
    cfg = case.config
    training, found = random_training(cfg, hardware(device)), {}
    for it in range(2 * cfg.critic.ratio):
        counts = Counts()
        with counting_passes(training.models, counts), _Counting(counts):
            train_step(training.models, training.batches.at(it), it, cfg)
        found["critic only" if it % cfg.critic.ratio else "student"] = counts.as_json()
    return found


def traced(case: Case) -> dict[str, int]:
    """Graphs that PyTorch traces for compilation in the first two iterations and later, and breaks between graphs.

    The CPU runs them as they were traced, since it is the tracing that decides.
    """
    graphs, plain = list[int](), torch.compile

    def eager(function: Any = None, **options: Any) -> Any:
        return plain(function, **{**options, "backend": "eager"})

    torch._dynamo.reset()
    counters.clear()
    with mock.patch("torch.compile", eager):
        training = random_training(case.config, hardware("cpu", compiled=case.compiled))
        for _ in range(3 * case.config.critic.ratio):
            training.iterate()
            graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs[1], "later": graphs[-1] - graphs[1], "breaks": sum(counters["graph_break"].values())}


def main() -> None:
    """Write the counts of the case that the last argument gives as JSON."""
    case = Case(*json.loads(sys.argv[-1]))
    torch.set_num_threads(1)
    count = traced if case.compiled else on_meta if case.meta else on_cpu
    print(json.dumps(count(case)))


if __name__ == "__main__":
    main()
