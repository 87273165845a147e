"""Distil from hidden states: a divergence of logits of which only one chunk of rows is ever in memory.

The logits of a language model are its last hidden states times its output layer, and much larger than either: for 8,192
tokens and a vocabulary of 151,936 they are 5 GB in float32, once for the teacher, once for the student, and again for
each gradient and intermediate result. `LinearDivergence` computes them chunk by chunk, and lets klcore write the
student's gradient over its logits. It keeps only the gradients of the hidden states, of the output layer and of its
bias. The loss is any of klcore's functions of two distributions. TRL and Liger-Kernel have losses of this kind; this
one is meant to be copied.

This script compares its memory, time and error from float64 with those of three losses that compute all logits
(klcore's, PyTorch's, and ``torch.compile`` of PyTorch's), each in a separate process. Run it with ``make examples``, or
(half a minute)::

    pip install "klcore[examples]"
    python examples/linear_distillation.py
    python examples/linear_distillation.py --full    # a vocabulary of 151,936: ten minutes, 8 GB of memory
"""

import argparse
import ctypes
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import klcore

CHUNK_BYTES = 2**28  # of logits, for teacher and student together
TILE = 4096  # classes of an output layer that are multiplied at a time
PADDING = -100  # the label of rows that are left out


class Side(NamedTuple):
    """What the logits of one model are computed from. `softcap` is Gemma's: ``softcap * tanh(logits / softcap)``."""

    hidden: torch.Tensor  # (rows, features)
    weight: torch.Tensor  # (classes, features)
    bias: torch.Tensor | None = None  # (classes,)
    softcap: float | None = None

    @property
    def wide(self):
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def tiles(self):
        """Slices of the classes, so that no product needs a copy as large as the output layer."""
        return [slice(k, k + TILE) for k in range(0, len(self.weight), TILE)]

    def logits(self, rows, out):
        hidden = self.hidden[rows]
        for tile in self.tiles():
            product(hidden, self.weight[tile].T, out=out[:, tile])
        if self.bias is not None:
            out += self.bias
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


def product(a, b, out=None):
    """``a @ b``, at least float32: rounding logits to 16 bits loses what makes up a small divergence.

    On CUDA PyTorch does that for 16-bit matrices. On the CPU it rounds the product, so they are widened first.
    """
    if b.is_cuda and b.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32, out=out)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.mm(a.to(wide), b.to(wide), out=out)


class LinearDivergence(torch.autograd.Function):
    """The sum over chunks of rows of ``divergence(teacher's logits, student's logits)``.

    Gradients are computed in forward, while the logits exist. Backward multiplies them by its cotangent, in place, so
    it can be called only once. A denominator is part of the cotangent: gradients of logits divided by it are too small
    for float16. The teacher is a tuple, which autograd does not look into, and has no gradient.
    """

    @staticmethod
    def forward(ctx, divergence, teacher, chunks, softcap, hidden, weight, bias):
        student = Side(hidden, weight, bias, softcap)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        gradients = dhidden, dweight, dbias = [  # sums over chunks and tiles: at least float32
            torch.zeros_like(t, dtype=student.wide) if needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad[-3:], strict=True)
        ]
        most = len(chunks[0])
        x, y = (hidden.new_empty(most, len(side.weight), dtype=side.wide) for side in (teacher, student))
        g = y if softcap is None else torch.empty_like(y)  # the slope of a softcap needs y once more
        sizes = [len(rows) for rows in chunks]
        values = hidden.new_empty(sum(sizes), dtype=torch.promote_types(x.dtype, y.dtype))
        for rows, n, v in zip(chunks, sizes, values.split(sizes), strict=True):
            a, b, db = teacher.logits(rows, out=x[:n]), student.logits(rows, out=y[:n]), g[:n]
            if not any(ctx.needs_input_grad):
                divergence(a, b, space="logits", out=v)
                continue
            divergence(a, b, space="logits", return_grad="y", out=(v, db))
            if softcap is not None:
                db *= b.div_(softcap).square_().neg_().add_(1)
            h = hidden[rows]
            for tile in student.tiles():
                if dhidden is not None:
                    dhidden[rows] += product(db[:, tile], weight[tile])
                if dweight is not None:
                    dweight[tile] += product(db[:, tile].T, h)
            if dbias is not None:
                dbias += db.sum(0)
        ctx.save_for_backward(*gradients)
        return values.sum(dtype=torch.float64).to(values.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, *(None if g is None else g.mul_(cotangent).to(dtype) for g, dtype in found)


def linear_divergence(teacher, student, labels, *, divergence=klcore.kl_div, denominator=None, chunk_bytes=CHUNK_BYTES):
    """The mean of ``divergence(teacher, student, space="logits")`` for two `Side`, over the rows that have a label.

    `labels` has one label per row, already shifted; or it is a boolean mask. Rows without a label are left out before
    the multiplication. `denominator` is for a batch that is computed in parts: the number of all rows, which divides
    the sum. Bind parameters of the divergence with ``functools.partial(klcore.js_div, beta=0.1, temperature=2.0)``, or
    for the reverse divergence ``functools.partial(klcore.mixed_kl_div, forward=0.0)``.
    """
    shapes = [tuple(t.shape) for t in (teacher.hidden[..., 0], student.hidden[..., 0], labels)]
    if len(set(shapes)) > 1 or labels.is_floating_point():
        raise ValueError(f"labels are integers or booleans, one per row of both sides; found {labels.dtype}, {shapes}")
    teacher, student = (side._replace(hidden=side.hidden.flatten(0, -2)) for side in (teacher, student))
    labelled = labels if labels.dtype is torch.bool else labels != PADDING
    rows = labelled.flatten().nonzero().squeeze(1)
    chunks = 2 if student.softcap is None else 3
    size = max(1, chunk_bytes // (chunks * len(student.weight) * student.wide.itemsize))
    tensors = [t if t is None or torch.is_grad_enabled() else t.detach() for t in student[:3]]
    with torch.autocast(student.hidden.device.type, enabled=False):  # which would round the products
        total = LinearDivergence.apply(divergence, teacher, rows.split(size), student.softcap, *tensors)
    return total / (max(1, len(rows)) if denominator is None else denominator)


# ---- memory, time and error, compared with losses that compute all logits -------------------------------------------


def by_chunks(teacher, student, labels, chunk_bytes):
    return linear_divergence(teacher, student, labels, chunk_bytes=chunk_bytes)


def with_klcore(teacher, student, labels, chunk_bytes):
    """All logits of the rows that have a label, and autograd."""
    kept = labels != PADDING
    x, y = (side.hidden[kept] @ side.weight.T for side in (teacher, student))
    return klcore.kl_div(x, y, space="logits", reduction="rowmean")


def with_pytorch(teacher, student, labels, chunk_bytes):
    kept = labels != PADDING
    x, y = (F.log_softmax((side.hidden[kept] @ side.weight.T).float(), -1) for side in (teacher, student))
    return F.kl_div(y, x, reduction="batchmean", log_target=True)


def compiled(teacher, student, labels, chunk_bytes):
    return torch.compile(with_pytorch)(teacher, student, labels, chunk_bytes)


WAYS = {"klcore, by chunks": by_chunks, "klcore": with_klcore, "PyTorch": with_pytorch, "torch.compile": compiled}


class Size(NamedTuple):
    rows: int
    features: int  # of the student; the teacher has twice as many
    classes: int
    chunk_bytes: int
    rounds: int


QUICK = Size(640, 256, 32_000, 2**25, 2)
FULL = Size(1920, 512, 151_936, 2**28, 1)


def batch(size, dtype):
    """A teacher, and a student that knows half of it, the same numbers in all dtypes; a fifth of rows is padding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden, weight = normal(size.rows, size.features), normal(size.classes, size.features) * (3 / size.features**0.5)
    more = normal(size.rows, size.features), normal(size.classes, size.features) * (0.5 / size.features**0.5)
    teacher = Side(*(torch.cat(pair, dim=1).to(dtype) for pair in zip((hidden, weight), more, strict=True)))
    labels = torch.randint(size.classes, (size.rows,), generator=generator)
    labels[-size.rows // 5 :] = PADDING
    return teacher, Side(*(t.to(dtype).requires_grad_() for t in (hidden, weight))), labels


def step(way, teacher, student, labels, chunk_bytes):
    """Value and gradients."""
    value = way(teacher, student, labels, chunk_bytes)
    return [value.detach(), *torch.autograd.grad(value, student[:2])]


def expected(size):
    """By PyTorch's functions in float64, a few rows at a time."""
    teacher, student, labels = batch(size, torch.float64)
    found = [torch.zeros((), dtype=torch.float64), *map(torch.zeros_like, student[:2])]
    n = (labels != PADDING).sum()
    for rows in (labels != PADDING).nonzero().squeeze(1).split(64):
        x, y = (F.log_softmax(side.hidden[rows] @ side.weight.T, -1) for side in (teacher, student))
        value = F.kl_div(y, x, reduction="sum", log_target=True) / n
        for total, part in zip(found, (value.detach(), *torch.autograd.grad(value, student[:2])), strict=True):
            total += part
    return found


def resident(name):
    """VmRSS, or VmHWM, its highest value since the last reset, in bytes; Linux has them."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measured(function, *arguments):
    """The function's result, its processor seconds, and its peak memory in megabytes (on Linux)."""
    linux = sys.platform == "linux"
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be reused
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    begun = time.process_time()
    found = function(*arguments)
    seconds = time.process_time() - begun
    return found, seconds, (resident("VmHWM") - before) / 1e6 if linux else float("nan")


def process(rank, size, name, folder):
    """Print two lines of the table, in a separate process."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        call = step, WAYS[name], *batch(size, dtype), size.chunk_bytes
        step(*call[1:])  # so that whatever is created only once exists
        fastest = float("inf")
        for _ in range(size.rounds):
            found, seconds, megabytes = measured(*call)
            fastest = min(fastest, seconds)
        pairs = zip(found, torch.load(Path(folder, "expected")), strict=True)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        print(
            f"{name:<18} {str(dtype).removeprefix('torch.'):<9}{megabytes:8.0f}{fastest:8.2f}"
            + "".join(f"{error:10.0e}" for error in errors),
            flush=True,
        )
        if WAYS[name] is by_chunks and not (errors[0] <= 1e-5 and max(errors) <= bound):
            raise SystemExit("the results by chunks do not agree with float64")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="a vocabulary of 151,936 classes")
    size = FULL if parser.parse_args().full else QUICK
    ways = dict(WAYS)
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("torch.compile is left out: it needs a C++ compiler")
        del ways["torch.compile"]
    kept = size.rows - size.rows // 5
    logits, layer = (4e-6 * n * size.classes for n in (kept, size.features))
    print(f"KL of {kept:,} rows with a label, of {size.rows:,}, over {size.classes:,} classes; hidden states of the")
    print(f"teacher have {2 * size.features:,} features, the student's {size.features:,}. Float32 logits of one model:")
    print(f"{logits:,.0f} MB, here in chunks of {size.chunk_bytes / 1e6:,.0f} MB for both; its layer: {layer:,.0f} MB.")
    print(f"klcore {klcore.__version__}, PyTorch {torch.__version__}, threads: {torch.get_num_threads()}\n")
    print(
        "MB: at the peak, above the inputs. s: of all processors. Errors: relative, of the value and of the gradients"
    )
    print("of the hidden states and of the layer, against float64.\n")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(expected(size), Path(folder, "expected"))
        print(f"{'how':<18} {'states':<9}{'MB':>8}{'s':>8}{'value':>10}{'hidden':>10}{'layer':>10}")
        for name in ways:
            torch.multiprocessing.spawn(process, (size, name, folder))
    print(
        "\nMemory by chunks does not grow with the rows, which here are few; --full shows that. In bfloat16 it is the"
        "\nonly way that does not round the logits: compare the gradients' errors."
    )


if __name__ == "__main__":
    main()
