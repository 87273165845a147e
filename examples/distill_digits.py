"""Distil a teacher network into a smaller student, with klcore as the loss: value and gradient from one call.

Hinton, Vinyals and Dean ("Distilling the Knowledge in a Neural Network", 2015) train a small network on the softened
output of a large one, minimising T^2 * KL(softmax(teacher / T) || softmax(student / T)). Here the data are the 1,797
handwritten digits of scikit-learn, the teacher is a 64-128-10 perceptron, the student has a hidden layer of 16, and
both are plain NumPy: backpropagation starts from the gradient that ``klcore.kl_div(..., return_grad="y")`` returns with
the loss.

The same student is also trained on the labels alone, the final KL is checked against SciPy, and a picture shows the
training and where the student still differs from its teacher.

Run it with ``make demo``, or (about ten seconds)::

    pip install "klcore[demo]"
    python examples/distill_digits.py
"""

import numpy as np
from scipy.special import rel_entr, softmax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from style import figure, head, save
from tqdm import tqdm

import klcore

TEACHER, STUDENT = 128, 16  # hidden units
TEMPERATURE = 4.0
EPOCHS = 60
BATCH = 32
STARTS = 5  # random initialisations a student is trained from: one alone says little


def load():
    """Images as rows of 64 pixels in 0..1, and labels: 1,347 to train with, 450 to test."""
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    return train_test_split(images, digits.target, test_size=0.25, stratify=digits.target, random_state=0)


# A network is a list of four arrays: two layers of weights and biases, with a ReLU between them.


def network(hidden, seed):
    rng = np.random.default_rng(seed)

    def layer(fan_in, fan_out):
        weights = rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out))
        return [weights.astype(np.float32), np.zeros(fan_out, np.float32)]

    return layer(64, hidden) + layer(hidden, 10)


def forward(net, images):
    w1, b1, w2, b2 = net
    hidden = np.maximum(images @ w1 + b1, 0)
    return hidden, hidden @ w2 + b2


def logits(net, images):
    return forward(net, images)[1]


def backward(net, images, hidden, dlogits):
    """The gradient of the loss with respect to the four arrays, from that with respect to the logits."""
    dhidden = (dlogits @ net[2].T) * (hidden > 0)
    return [images.T @ dhidden, dhidden.sum(axis=0), hidden.T @ dlogits, dlogits.sum(axis=0)]


def accuracy(net, images, labels):
    return float((logits(net, images).argmax(axis=1) == labels).mean())


def adam(net, rate=3e-3, beta1=0.9, beta2=0.999):
    """Return a function that takes a gradient and makes one step of Adam, in place."""
    first, second = [np.zeros_like(a) for a in net], [np.zeros_like(a) for a in net]
    steps = 0

    def step(gradient):
        nonlocal steps
        steps += 1
        size = rate * np.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        for a, g, m, v in zip(net, gradient, first, second, strict=True):
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            a -= size * m / (np.sqrt(v) + 1e-8)

    return step


def distillation_loss(teacher_logits, student_logits):
    """T^2 * KL(teacher || student) at temperature T, the mean over images, and its gradient for the student.

    At temperature T the gradient shrinks as 1/T^2; the factor T^2 of Hinton et al. undoes this, so that the learning
    rate does not depend on T.
    """
    loss, gradient = klcore.kl_div(
        teacher_logits, student_logits, space="logits", temperature=TEMPERATURE, return_grad="y", reduction="rowmean"
    )
    return TEMPERATURE**2 * loss, TEMPERATURE**2 * gradient


def label_loss(one_hot, student_logits):
    """Ordinary training: the cross-entropy with the labels, which are probabilities that are 0 or 1."""
    return klcore.cross_entropy(
        one_hot, student_logits, space=("probs", "logits"), return_grad="y", reduction="rowmean"
    )


def train(net, images, targets, loss, seed):
    """Train `net` in place with ``loss(targets, logits) -> (value, gradient)``; yield the mean loss of each epoch."""
    rng = np.random.default_rng(seed)
    step = adam(net)
    for _ in range(EPOCHS):
        total = 0.0
        order = rng.permutation(len(images))
        for batch in np.array_split(order, len(images) // BATCH):
            hidden, out = forward(net, images[batch])
            value, dlogits = loss(targets[batch], out)
            step(backward(net, images[batch], hidden, dlogits))
            total += float(value) * len(batch)
        yield total / len(images)


def trained(hidden, images, targets, loss, seed):
    net = network(hidden, seed)
    for _ in train(net, images, targets, loss, seed):
        pass
    return net


def distil(teacher_logits, images, labels, test_images, test_labels):
    """Distil one student, reporting every epoch; returns it and the rows (KL, train accuracy, test accuracy)."""
    net, history = network(STUDENT, seed=0), []
    epochs = train(net, images, teacher_logits, distillation_loss, seed=0)
    print(f"{'epoch':>5}  {'KL (nats)':>9}  {'train accuracy':>14}  {'test accuracy':>13}")
    # disable=None: a bar on terminals only; the lines are printed everywhere
    for epoch, loss in enumerate(tqdm(epochs, total=EPOCHS, desc="distilling", leave=False, disable=None), 1):
        row = loss / TEMPERATURE**2, accuracy(net, images, labels), accuracy(net, test_images, test_labels)
        history.append(row)
        tqdm.write(f"{epoch:5}  {row[0]:9.5f}  {row[1]:14.1%}  {row[2]:13.1%}")
    return net, np.array(history)


def check_with_scipy(x, y):
    """Mean KL of the test images, by klcore from float32 logits and by SciPy from float64 softmaxes of the same."""
    ours = float(klcore.kl_div(x, y, space="logits", temperature=TEMPERATURE, reduction="rowmean"))
    p, q = (softmax(a.astype(np.float64) / TEMPERATURE, axis=1) for a in (x, y))
    scipys = float(rel_entr(p, q).sum(axis=1).mean())
    print(f"\nKL(teacher || student) on the test images at temperature {TEMPERATURE:g}, in nats")
    print(f"  klcore, float32         {ours:.12f}")
    print(f"  SciPy rel_entr, float64 {scipys:.12f}")
    print(f"  difference              {ours - scipys:+.1e}   ({(ours - scipys) / scipys:+.1e} relative)")
    assert abs(ours - scipys) <= 1e-5 * scipys


def contributions(x, y, labels):
    """What each class adds to the KL, the mean over the test images of each digit: (true digit, class), in nats.

    Every term of `kl_div` is >= 0, so that terms can be compared and averaged; those of `rel_entr` have both signs.
    """
    terms = klcore.kl_div(x, y, space="logits", temperature=TEMPERATURE, reduction="none")
    return np.stack([terms[labels == digit].mean(axis=0) for digit in range(10)])


def draw(history, teacher_accuracy, terms, theme):
    """Above: loss and accuracy by epoch. Below: which classes make up the KL that remains."""
    picture = figure(8.4)
    axes = picture.subplot_mosaic([["loss", "accuracy"], ["terms", "terms"]], height_ratios=[1, 2.2])
    epochs = np.arange(1, len(history) + 1)
    axes["loss"].semilogy(epochs, history[:, 0], color=theme["blue"], linewidth=2)
    axes["loss"].set(title="KL(teacher || student), nats", xlabel="epoch")
    axes["loss"].yaxis.set_major_formatter("{x:g}")

    axes["accuracy"].plot(epochs, 100 * history[:, 2], color=theme["blue"], linewidth=2)
    axes["accuracy"].axhline(100 * teacher_accuracy, color=theme["orange"], linestyle="--")
    axes["accuracy"].text(EPOCHS, 100 * teacher_accuracy + 1, "teacher", ha="right", va="bottom", color=theme["orange"])
    axes["accuracy"].set(title="test images right, %", xlabel="epoch", ylim=(50, 105))

    axes["terms"].imshow(1000 * terms, cmap="viridis", vmin=0, aspect="auto")
    for (digit, cls), value in np.ndenumerate(1000 * terms):
        dark = value < 600 * terms.max()  # viridis is dark below
        axes["terms"].text(cls, digit, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes["terms"].set(
        title="what each class adds to the KL that remains, thousandths of a nat", xlabel="class of the output",
        ylabel="true digit", xticks=range(10), yticks=range(10),
    )  # fmt: skip
    axes["terms"].grid(visible=False)
    axes["terms"].spines[:].set_visible(False)
    head(picture, f"A student of {STUDENT} hidden units learns from a teacher of {TEACHER}")
    return picture


def main():
    images, test_images, labels, test_labels = load()
    one_hot = np.eye(10, dtype=np.float32)[labels]
    print(f"{len(images)} images to train with, {len(test_images)} to test; klcore {klcore.__version__}\n")

    teacher = trained(TEACHER, images, one_hot, label_loss, seed=0)
    teacher_logits = logits(teacher, images)
    student, history = distil(teacher_logits, images, labels, test_images, test_labels)

    students = {"student, distilled": [student], "same student, labels only": []}
    others = [(start, name) for name in students for start in range(len(students[name]), STARTS)]
    for start, name in tqdm(others, desc="other starts", leave=False, disable=None):
        targets, loss = (one_hot, label_loss) if "labels" in name else (teacher_logits, distillation_loss)
        students[name].append(trained(STUDENT, images, targets, loss, seed=start))

    x, y = logits(teacher, test_images), logits(student, test_images)
    check_with_scipy(x, y)

    print(f"\nTest accuracy; students: the mean of {STARTS} random starts, and the range")
    print(f"  {'network':<26}{'parameters':>10}{'accuracy':>10}   range")
    for name, nets in {"teacher": [teacher], **students}.items():
        scores = [accuracy(net, test_images, test_labels) for net in nets]
        size = sum(a.size for a in nets[0])
        spread = f"{min(scores):.1%} to {max(scores):.1%}" if len(nets) > 1 else ""
        print(f"  {name:<26}{size:>10,}{np.mean(scores):>10.1%}   {spread}".rstrip())

    drawn = history, accuracy(teacher, test_images, test_labels), contributions(x, y, test_labels)
    save("distill_digits", lambda theme: draw(*drawn, theme))


if __name__ == "__main__":
    main()
