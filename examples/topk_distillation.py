"""Distil a language model from the k largest log-probabilities of its teacher, stored in a file.

A teacher's answer to every token of a text is as many numbers as the vocabulary has words, too many to keep. So the
largest are kept, with their places, and the probability of all others as one number: here 8 of 1,000, as float16,
uint32 and float32. What a student makes of the others is a choice, klcore's `tail`:

* "bucket": all others are one class more, which is to have the probability that they have together;
* "zero": they have none;
* "renorm": they do not count: teacher and student are normalised on what is listed.

The text is the source of Python's standard library, which comes with every Python, as its own tokens. Teacher and
student are those of Bengio et al. ("A Neural Probabilistic Language Model", 2003): embeddings of the tokens before, a
hidden layer, a softmax. The student is trained from the same random weights, on the same batches, five times: with the
three tails, with all that the teacher says, and with the next token alone. What comes out is judged on files that
neither has seen.

Run it with ``make examples``, or (about half a minute)::

    pip install "klcore[examples]"
    python examples/topk_distillation.py
"""

import io
import sysconfig
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from style import figure, head, save
from tqdm import tqdm

import klcore

VOCAB, K = 1000, 8
CONTEXT = 6  # tokens before
TEACHER, STUDENT = (48, 192), (24, 32)  # embedding, hidden units
FILES = 60  # of the standard library
BATCH, RATE = 512, 4e-3
TEACHER_EPOCHS, EPOCHS = 3, 5
TAILS = ("bucket", "zero", "renorm")
ALL, LABELS = "all classes", "next token"  # the other two students' teachers


def tokens_of(path):
    """The tokens of a source file. A literal is but a number or a string; comments and line breaks within are none."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    named = {tokenize.NAME, tokenize.OP}
    for token in tokenize.tokenize(io.BytesIO(path.read_bytes()).readline):
        if token.type not in silent:
            yield token.string if token.type in named else tokenize.tok_name[token.type]


def load():
    """What the teacher learns from, what it is asked about for the students, and what both are judged by: each the
    tokens before, and the token itself. 0 is any rare name."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    texts = [list(tokens_of(path)) for path in library[:FILES]]
    known = [word for word, _ in Counter(word for text in texts for word in text).most_common(VOCAB - 1)]
    number = {word: k for k, word in enumerate(known, 1)}
    windows = [
        np.lib.stride_tricks.sliding_window_view([number.get(word, 0) for word in text], CONTEXT + 1)
        for text in texts
        if len(text) > CONTEXT
    ]
    for some in (range(6), (6, 7, 8), (9,)):
        part = [w for k, w in enumerate(windows) if k % 10 in some]
        both = torch.from_numpy(np.concatenate(part))
        yield both[:, :-1], both[:, -1]


def network(embedding, hidden):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(VOCAB, embedding),
        torch.nn.Flatten(),
        torch.nn.Linear(CONTEXT * embedding, hidden),
        torch.nn.Tanh(),
        torch.nn.Linear(hidden, VOCAB),
    )


def train(net, before, loss, epochs, name):
    """Train `net` in place with ``loss(numbers of the rows, logits)``; yield after every epoch."""
    order = torch.Generator().manual_seed(0)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(before), generator=order).split(BATCH)]
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    # disable=None: a bar on terminals only
    for step, batch in enumerate(tqdm(batches, desc=name, leave=False, disable=None), 1):
        optimizer.zero_grad()
        loss(batch, net(before[batch])).backward()
        optimizer.step()
        decay.step()
        if step % (len(batches) // epochs) == 0:
            yield


def logits(net, before):
    with torch.no_grad():
        return torch.cat([net(part) for part in before.split(4096)])


def store(path, teacher, before):
    """The teacher's k largest, and what the others have together, which no sum of rounded numbers would give."""
    log_probs = logits(teacher, before).log_softmax(-1)
    largest = log_probs.topk(K)
    others = log_probs.exp().scatter(-1, largest.indices, 0).sum(-1, dtype=torch.float64)
    np.savez(
        path,
        log_probs=largest.values.numpy().astype(np.float16),
        indices=largest.indices.numpy().astype(np.uint32),
        tail_mass=others.numpy().astype(np.float32),
    )


def labels_loss(after):
    return lambda batch, out: torch.nn.functional.cross_entropy(out, after[batch])


def losses(path, teacher, before, after):
    """A student's loss, for each of the five teachers: of the numbers of the rows, and of its logits."""
    with np.load(path) as file:
        stored = dict(file)  # in the order of store's names

    def listed(tail):
        def loss(batch, student):
            log_probs, indices, tail_mass = (torch.from_numpy(a[batch.numpy()]) for a in stored.values())
            return klcore.kl_div(
                log_probs, student, space=("log_probs", "logits"), indices=indices, tail=tail,
                tail_mass=tail_mass if tail == "bucket" else None, reduction="rowmean",
            )  # fmt: skip

        return loss

    answers = logits(teacher, before)
    return {tail: listed(tail) for tail in TAILS} | {
        ALL: lambda batch, student: klcore.kl_div(answers[batch], student, space="logits", reduction="rowmean"),
        LABELS: labels_loss(after),
    }


def judge(teacher, student, after):
    """Of logits: nats from the teacher, nats a token, tokens that are right, tokens that are the teacher's."""
    best = student.argmax(-1)
    return (
        float(klcore.kl_div(teacher, student, space="logits", reduction="rowmean")),
        float(torch.nn.functional.cross_entropy(student, after)),
        float((best == after).double().mean()),
        float((best == teacher.argmax(-1)).double().mean()),
    )


def rest(of, places):
    """The probability outside of these places."""
    return of.softmax(-1).scatter(-1, places, 0).sum(-1)


def draw(histories, outside, truth, theme):
    """Above: how far students are from the teacher, by epoch. Below: what they give to the classes that are not listed,
    where the teacher gives them little and where it gives them much."""
    picture = figure(8.4)
    above, below = picture.subplots(2, 1, height_ratios=[1, 1.2])
    groups = torch.tensor_split(truth.argsort(), 12)
    x = [100 * float(truth[group].mean()) for group in groups]
    colours = dict(zip(histories, ("blue", "orange", "pink", "green", "grey"), strict=True))
    for name, colour in colours.items():
        style = {"color": theme[colour], "linewidth": 2, "linestyle": "-" if name in TAILS else "--", "marker": "o"}
        above.semilogy(range(1, EPOCHS + 1), histories[name][:, 0], label=name, **style)
        below.plot(x, [100 * float(outside[name][group].mean()) for group in groups], **style)
    below.axline((0, 0), slope=1, color=theme["ink"], linewidth=1)
    below.annotate("as the teacher", (40, 40), (4, -4), textcoords="offset points", va="top")
    above.set_xticks(range(1, EPOCHS + 1))
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("{x:g}")
    above.set(title="KL(teacher || student), nats", xlabel="epoch")
    below.set(
        title=f"probability of the {VOCAB - K} classes that are not listed, %", xlabel="the teacher's",
        ylabel="the students'", ylim=(0, 100),
    )  # fmt: skip
    head(picture, f"One student, five losses: {K} of {VOCAB:,} classes are stored", above.lines, 5)
    return picture


def main():
    torch.set_num_threads(1)  # the matrices are small; and figures do not depend on how many processors there are
    klcore.set_num_threads(1)
    (before, after), (asked, asked_after), (judged, judged_after) = load()
    print(
        f"{len(after):,} tokens for the teacher, {len(asked):,} for students, {len(judged):,} to judge by; "
        f"klcore {klcore.__version__}, PyTorch {torch.__version__}\n"
    )
    teacher = network(*TEACHER)
    for _ in train(teacher, before, labels_loss(after), TEACHER_EPOCHS, "teacher"):
        pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "teacher.npz")
        store(path, teacher, asked)
        size = path.stat().st_size
        of_students = losses(path, teacher, asked, asked_after)
    print(f"stored: {size / len(asked):.0f} bytes a token; all classes in float16 would be {2 * VOCAB:,}\n")

    truth = logits(teacher, judged)
    places = truth.topk(K).indices
    others = rest(truth, places)
    _, nats, right, _ = judge(truth, truth, judged_after)
    print(
        "KL: of the student from the teacher; surprise: the next token's; right: how often the likeliest token is the\n"
        "next one; same: how often it is the teacher's; outside: the probability of all classes not listed.\n"
    )
    print(f"{'trained with':<14}{'KL':>14}{'surprise':>14}{'right':>8}{'same':>12}{'outside':>12}")
    print(f"{'(teacher)':<14}{'':>14}{nats:>9.3f} nats{right:>8.1%}{'':>12}{others.mean():>12.1%}")
    histories, outside = {}, {}
    for name, loss in of_students.items():
        net, history = network(*STUDENT), []
        for _ in train(net, asked, loss, EPOCHS, name):
            student = logits(net, judged)
            history.append(judge(truth, student, judged_after))
        histories[name], outside[name] = np.array(history), rest(student, places)
        kl, nats, right, same = history[-1]
        print(
            f"{name:<14}{kl:>9.3f} nats{nats:>9.3f} nats{right:>8.1%}{same:>12.1%}{outside[name].mean():>12.1%}",
            flush=True,
        )
    print(
        f"\nOf {len(judged):,} tokens: the standard error of a share of half is {0.5 / len(judged) ** 0.5:.1%}.\n"
        "Of the three tails bucket is the one whose minimum is the teacher, as far as the list tells: compare its KL\n"
        "and what is outside with those of all classes. zero asks for nothing outside, and renorm nothing about it."
    )
    save("topk_distillation", lambda theme: draw(histories, outside, others, theme))


if __name__ == "__main__":
    main()
