"""Distil over a vocabulary that is split over processes: Megatron's vocabulary-parallel loss, with klcore.Shard.

Each of two processes holds half of the vocabulary: its columns of the teacher's and of the student's output layer, and
so its half of the logits. `VocabularyParallel` is a loss of whole rows. Its forward exchanges 72 bytes per row and
process; no gradient goes through a collective, and no process ever holds a whole row of logits.

Value and gradients, and then a few steps of training, are compared with those of one process that has the whole
vocabulary. Run it with ``make examples``, or (about ten seconds)::

    pip install "klcore[examples]"
    python examples/tensor_parallel.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import klcore

PROCESSES = 2
TOKENS, HIDDEN, VOCABULARY = 48, 32, 20_000  # the halves of the vocabulary are not multiples of 1024
TEMPERATURE = 2.0
STEPS = 5
AGREEMENT = 1e-5  # relative: float32, whose matrix products differ as well


class VocabularyParallel(torch.autograd.Function):
    """One value per token, for whole rows, from this process's logits; the gradient is the student's."""

    @staticmethod
    def forward(ctx, teacher, student, mask):
        shard = klcore.Shard("kl_div", teacher, student, space="logits", weights=mask, temperature=TEMPERATURE)
        for _ in range(shard.exchanges):
            mine = shard.state(fold=True)
            states = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(states, mine)
            shard.join(states)
        ctx.shard = shard
        return shard.values()

    @staticmethod
    def backward(ctx, cotangent):
        return None, ctx.shard.gradient("y", cotangent), None


class Copied(torch.autograd.Function):
    """The same hidden states in every process; their gradients are summed over the processes (Megatron's f)."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def whole_loss(teacher, student, mask):
    return klcore.kl_div(teacher, student, space="logits", weights=mask, temperature=TEMPERATURE)


def train(hidden, teacher, student, mask, loss, copied=lambda hidden: hidden):
    """Train the student's part of the output layer for some steps. Yields the loss, and the gradients of layer and
    states."""
    student = student.clone().requires_grad_()
    optimizer = torch.optim.SGD([student], lr=50.0)
    for _ in range(STEPS):
        states = hidden.clone().requires_grad_()
        value = loss(hidden @ teacher, copied(states) @ student, mask).sum() / mask.sum()
        optimizer.zero_grad()
        value.backward()
        yield value.detach(), student.grad.clone(), states.grad
        optimizer.step()


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def process(rank, meeting_point):
    torch.set_num_threads(1)
    klcore.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    hidden, mask = torch.randn(TOKENS, HIDDEN), torch.ones(TOKENS)
    mask[-8:] = 0  # padding
    teacher, student = 0.5 * torch.randn(2, HIDDEN, VOCABULARY)
    mine = slice(rank * VOCABULARY // PROCESSES, (rank + 1) * VOCABULARY // PROCESSES)
    parallel = train(hidden, teacher[:, mine], student[:, mine], mask, VocabularyParallel.apply, Copied.apply)
    alone = train(hidden, teacher, student, mask, whole_loss)
    worst = torch.zeros(3)
    for (value, layer, states), (one, whole_layer, whole_states) in zip(parallel, alone, strict=True):
        of_step = difference(value, one), difference(layer, whole_layer[:, mine]), difference(states, whole_states)
        worst = torch.maximum(worst, torch.tensor(of_step))
        if rank == 0:
            print(f"loss {value:.6f} in {PROCESSES} processes, {one:.6f} in one")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        print("largest relative difference of the value, the layer's gradient and the hidden states':")
        print("  " + ", ".join(f"{d:.0e}" for d in worst))
    dist.destroy_process_group()
    if not worst.max() <= AGREEMENT:
        raise SystemExit("the processes' results are not those of one")


def main():
    half = VOCABULARY // PROCESSES
    print(f"{TOKENS} tokens, {half:,} of {VOCABULARY:,} classes a process; klcore {klcore.__version__}")
    print(f"exchanged a row and process: 72 bytes; its logits are {2 * 4 * half:,}\n")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (Path(folder) / "meeting",), PROCESSES)


if __name__ == "__main__":
    main()
