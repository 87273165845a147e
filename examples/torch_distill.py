"""Distil a teacher into a student with PyTorch, through klcore's autograd and through torch.nn.KLDivLoss.

The loss is T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch (Hinton, Vinyals and Dean,
"Distilling the Knowledge in a Neural Network", 2015). klcore takes both logits as they are; PyTorch's loss takes
log-probabilities first, and probabilities second. The data are the 1,797 handwritten digits of scikit-learn, the
teacher is a perceptron with 128 hidden units, the student has 16.

The student is trained twice, from the same weights and on the same batches, once with each loss. Both must agree to
four digits in every epoch, or this script fails. The networks are float64 for that reason: differences of rounding grow
in training. Then the two losses are timed on float32 logits of the size of a language model's, forward and backward.

Run it with ``make examples``, or (about twenty seconds)::

    pip install "klcore[examples]"
    python examples/torch_distill.py
"""

import statistics
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from style import figure, head, save
from tqdm import tqdm

import klcore

TEACHER, STUDENT = 128, 16  # hidden units
TEMPERATURE = 4.0
EPOCHS = 40
BATCH = 32
AGREEMENT = 1e-4  # relative: what the two losses of an epoch may differ by
ROWS, CLASSES, ROUNDS = 512, 32_000, 9  # of the timing: tokens, vocabulary
OURS, THEIRS = "klcore", "KLDivLoss"


def klcore_loss(teacher, student):
    """Either argument may require a gradient; here the student does."""
    divergence = klcore.kl_div(teacher, student, space="logits", temperature=TEMPERATURE, reduction="batchmean")
    return TEMPERATURE**2 * divergence


def torch_loss(teacher, student):
    """The same as PyTorch says it: the model first, in logarithms, then the truth, in probabilities."""
    log_q = torch.log_softmax(student / TEMPERATURE, dim=-1)
    p = torch.softmax(teacher / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * torch.nn.KLDivLoss(reduction="batchmean")(log_q, p)


LOSSES = {OURS: klcore_loss, THEIRS: torch_loss}


def load():
    """Images as rows of 64 pixels in 0..1, and labels: 1,347 to train with, 450 to test."""
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
    return map(torch.from_numpy, parts)


def network(hidden):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)).double()


def accuracy(net, images, labels):
    with torch.no_grad():
        return float((net(images).argmax(dim=-1) == labels).double().mean())


def train(net, images, targets, loss):
    """Train `net` in place with ``loss(targets, logits)``; yield the mean loss of each epoch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            value = loss(targets[batch], net(images[batch]))
            value.backward()
            optimizer.step()
            total += value.item() * len(batch)
        yield total / len(images)


def distil(teacher, images, labels, test_images, test_labels):
    """A student for each loss. Returns the networks, and for each epoch (loss, test accuracy)."""
    with torch.no_grad():
        targets = teacher(images)
    nets = {name: network(STUDENT) for name in LOSSES}
    runs = [train(nets[name], images, targets, loss) for name, loss in LOSSES.items()]
    histories = {name: [] for name in LOSSES}
    print("Loss (nats, times T^2); the difference is relative")
    print(f"{'epoch':>5}{OURS:>14}{THEIRS:>14}{'difference':>12}")
    # disable=None: a bar on terminals only; the lines are printed everywhere
    epochs = tqdm(zip(*runs, strict=True), total=EPOCHS, desc="distilling", leave=False, disable=None)
    for epoch, (ours, theirs) in enumerate(epochs, 1):
        for name, loss in ((OURS, ours), (THEIRS, theirs)):
            histories[name].append((loss, accuracy(nets[name], test_images, test_labels)))
        tqdm.write(f"{epoch:5}{ours:14.9f}{theirs:14.9f}{abs(ours - theirs) / theirs:12.0e}")
    return nets, {name: np.array(rows) for name, rows in histories.items()}


def time_steps():
    """Milliseconds that forward and backward take together, a list for each loss, in turns."""
    torch.manual_seed(0)
    teacher = 2 * torch.randn(ROWS, CLASSES)
    student = (teacher + torch.randn(ROWS, CLASSES)).requires_grad_()
    times, grads = {name: [] for name in LOSSES}, {}
    # disable=None: a bar on terminals only
    for turn in tqdm(range(ROUNDS + 1), desc="timing", leave=False, disable=None):
        for name, loss in LOSSES.items():
            student.grad = None
            start = time.perf_counter()
            loss(teacher, student).backward()
            if turn:  # the first is a rehearsal
                times[name].append(1000 * (time.perf_counter() - start))
            grads[name] = student.grad
    torch.testing.assert_close(grads[OURS], grads[THEIRS], rtol=1e-3, atol=1e-3 * float(grads[OURS].abs().max()))
    return times


def draw(histories, teacher_accuracy, theme):
    """Loss and accuracy by epoch."""
    styles = {
        OURS: {"color": theme["blue"], "linewidth": 6, "alpha": 0.5},
        THEIRS: {"color": theme["orange"], "linewidth": 1.6},
    }
    picture = figure(5.6)
    loss, right = picture.subplots(2, 1, sharex=True)
    epochs = np.arange(1, EPOCHS + 1)
    for name, style in styles.items():
        loss.semilogy(epochs, histories[name][:, 0], label=name, **style)
        right.plot(epochs, 100 * histories[name][:, 1], **style)
    loss.yaxis.set_major_formatter("{x:g}")
    loss.set(title="T² KL(teacher || student), nats")
    right.axhline(100 * teacher_accuracy, color=theme["green"], linestyle="--")
    right.text(EPOCHS, 100 * teacher_accuracy + 1, "teacher", ha="right", va="bottom", color=theme["green"])
    right.set(title="test images right, %", xlabel="epoch", ylim=(50, 105))
    head(picture, "klcore and PyTorch's KLDivLoss train the same student", loss.lines)
    return picture


def main():
    images, test_images, labels, test_labels = load()
    print(
        f"{len(images)} images to train with, {len(test_images)} to test; klcore {klcore.__version__}, "
        f"PyTorch {torch.__version__}\n"
    )
    teacher = network(TEACHER)
    for _ in train(teacher, images, labels, lambda labels, logits: torch.nn.functional.cross_entropy(logits, labels)):
        pass
    nets, histories = distil(teacher, images, labels, test_images, test_labels)
    times = time_steps()

    print("\nTest accuracy")
    for name, net in {"teacher": teacher, **{f"student, {name}": net for name, net in nets.items()}}.items():
        print(f"  {name:<20}{accuracy(net, test_images, test_labels):>7.1%}")
    print(
        f"\nForward and backward on ({ROWS}, {CLASSES}) float32 logits, {klcore.get_num_threads()} threads: median of"
    )
    print(f"{ROUNDS} rounds in turns, fastest and slowest, in milliseconds")
    for name, found in times.items():
        print(f"  {name:<12}{statistics.median(found):>7.1f}{min(found):>9.1f}{max(found):>9.1f}")
    ratios = [a / b for a, b in zip(times[THEIRS], times[OURS], strict=True)]
    print(f"  KLDivLoss takes {statistics.median(ratios):.1f} times as long (median of the rounds)")

    reached = accuracy(teacher, test_images, test_labels)
    save("torch_distill", lambda theme: draw(histories, reached, theme))
    ours, theirs = histories[OURS][:, 0], histories[THEIRS][:, 0]
    largest = (np.abs(ours - theirs) / theirs).max()
    if not largest <= AGREEMENT:
        raise SystemExit(f"the two losses differ by {largest:.0e} relative in an epoch")


if __name__ == "__main__":
    main()
