"""Classes of DTensors sharded over processes: memory, bytes exchanged, and differences from one process.

    python benchmarks/sharded.py [--rows 256] [--classes 151936] [--processes 2]

Every process computes a total of logits and its gradient by autograd: of whole rows without sharding, and of shards of
the classes with klcore and with PyTorch's own loss. Memory is the growth of the resident set at its peak (Linux),
beyond the logits themselves; bytes are those that each process sends, per row.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import klcore


def logits(rows: int, classes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, classes, generator=generator) * 3 for _ in "xy"]


def with_klcore(x: Any, y: Any) -> Any:
    return klcore.kl_div(x, y, space="logits", reduction="batchmean")


def with_pytorch(x: Any, y: Any) -> Any:
    return peers.torch_loss("logits", peers.torch_kl("batchmean"))(x, y)


class Sent(TorchDispatchMode):
    """Counts what is passed to collectives."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if DTensor in types:  # dispatch again, to see what it does with its local tensors
            return NotImplemented
        if function.namespace == "_c10d_functional" and function.name().partition("::")[2].startswith(
            ("all_", "reduce")
        ):
            self.bytes += arguments[0].nbytes
        return function(*arguments, **keywords or {})


def resident(name: str) -> int:
    """VmRSS, or VmHWM, its highest value since the last reset, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def whole(t: Any) -> Any:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def measure(loss: Callable[..., Any], x: Any, y: Any, folder: str, reference: bool) -> dict[str, float]:
    def step(x: Any, y: Any) -> Any:
        y.grad = None
        value = loss(x, y)
        value.backward()
        return value

    small = [t.redistribute(placements=t.placements) if isinstance(t, DTensor) else t for t in (x[:1], y[:1].detach())]
    step(small[0], small[1].detach().requires_grad_())  # so that whatever is created only once exists
    ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be reused
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    value = step(x, y)
    memory = resident("VmHWM") - before
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        step(x, y)
        seconds.append(time.perf_counter() - begun)
    with Sent() as sent:
        step(x, y)
    found = [whole(value), whole(y.grad)]
    file = Path(folder, "alone")
    if reference:
        torch.save(found, file)
    of_value, of_gradient = (
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, torch.load(file), strict=True)
    )
    return {
        "MB": memory / 1e6, "bytes": sent.bytes / len(x), "s": min(seconds), "value": of_value, "gradient": of_gradient,
    }  # fmt: skip


def work(rank: int, processes: int, shape: tuple[int, int], name: str, folder: str) -> None:
    threads = max(1, multiprocessing.cpu_count() // processes)
    torch.set_num_threads(threads)
    klcore.set_num_threads(threads)
    x, y = logits(*shape)
    if processes > 1:
        distributed.init_process_group("gloo", f"file://{folder}/{name}", world_size=processes, rank=rank)
        mesh = DeviceMesh("cpu", torch.arange(processes))
        x, y = (distribute_tensor(t, mesh, [Shard(1)]) for t in (x, y))
    found = measure(globals()[f"with_{name}"], x, y.requires_grad_(), folder, name == "klcore" and processes == 1)
    if rank == 0:
        print(
            f"{processes:9} {name:8} {found['MB']:7.0f} {found['bytes']:11,.0f} {found['s']:6.2f} "
            f"{found['value']:10.1e} {found['gradient']:10.1e}",
            flush=True,
        )
    if processes > 1:
        distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--classes", type=int, default=151_936)
    parser.add_argument("--processes", type=int, default=2)
    words = parser.parse_args()
    shape = words.rows, words.classes
    print(f"{shape} float32 logits, value and gradient; differences relative to the largest of klcore alone")
    print("processes with         MB   bytes/row      s      value   gradient")
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, words.processes):
            for name in ("klcore", "pytorch"):
                multiprocessing.spawn(work, (processes, shape, name, folder), processes)


if __name__ == "__main__":
    main()
