"""Judge a quantised language model: train a small one on real text, quantise it, and compare with `klcore compare`.

The text is Python's own language reference, which comes with every Python (`pydoc_data.topics`). The model is that of
Bengio et al. ("A Neural Probabilistic Language Model", 2003): the embeddings of the last six tokens, a hidden layer,
and a softmax over 2,000 words and signs; plain NumPy, with klcore's cross-entropy as the loss. Its weights are then
rounded three ways, each as it is done in the field:

* 8 bits in blocks of 32 weights with a scale each, as llama.cpp's Q8_0;
* 4 bits in such blocks, as Q4_0;
* 4 bits with one scale a row of the matrix, which is smaller and much worse.

The logits of texts that were not trained on are written as .npy, and each of the three is compared with the original,
as anybody would on the command line. Files are in examples/output/compare.

Run it with ``make demo-compare``, or (about a minute)::

    pip install "klcore[compare]"
    python examples/compare_quantised.py
"""

import base64
import json
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from style import figure, head, save
from tqdm import tqdm

import klcore
from klcore.__main__ import main as klcore_command

OUTPUT = Path(__file__).parent / "output" / "compare"
VOCAB, CONTEXT, EMBEDDING, HIDDEN = 2000, 6, 48, 192
EPOCHS, BATCH, RATE = 2, 256, 4e-3
LIMIT = 0.005  # nats of mean KL that the last word of this program allows


def tokens_of(text):
    return re.findall(r"[a-z]+|\d|[^\sa-z\d]", text.lower())


def load():
    """Texts as arrays of token numbers: those to train with, and every fifth, to judge by. 0 is any rare word."""
    texts = [tokens_of(text) for _, text in sorted(topics.items())]
    known = [word for word, _ in Counter(word for text in texts for word in text).most_common(VOCAB - 1)]
    number = {word: k for k, word in enumerate(known, 1)}
    texts = [np.array([number.get(word, 0) for word in text]) for text in texts if len(text) > CONTEXT]
    return [t for k, t in enumerate(texts) if k % 5], texts[::5]


def windows(text):
    """The tokens before each token of a text, and that token."""
    return np.lib.stride_tricks.sliding_window_view(text, CONTEXT)[:-1], text[CONTEXT:]


# ---- the model: a dict of arrays ------------------------------------------------------------------------------------


def new_model(seed=0):
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)

    return {
        "embedding": matrix(VOCAB, EMBEDDING),
        "hidden": matrix(CONTEXT * EMBEDDING, HIDDEN),
        "hidden bias": np.zeros(HIDDEN, np.float32),
        "output": matrix(HIDDEN, VOCAB),
        "output bias": np.zeros(VOCAB, np.float32),
    }


def forward(model, before):
    inputs = model["embedding"][before].reshape(len(before), -1)
    hidden = np.tanh(inputs @ model["hidden"] + model["hidden bias"])
    return inputs, hidden, hidden @ model["output"] + model["output bias"]


def gradients(model, before, after):
    """The mean loss of a batch, and its gradient for each array."""
    inputs, hidden, logits = forward(model, before)
    truth = np.zeros_like(logits)
    truth[np.arange(len(after)), after] = 1
    loss, dlogits = klcore.cross_entropy(
        truth, logits, space=("probs", "logits"), reduction="rowmean", return_grad="y", out=(None, logits)
    )
    dhidden = (dlogits @ model["output"].T) * (1 - hidden**2)
    dembedding = np.zeros_like(model["embedding"])
    np.add.at(dembedding, before, (dhidden @ model["hidden"].T).reshape(*before.shape, EMBEDDING))
    return float(loss), {
        "embedding": dembedding,
        "hidden": inputs.T @ dhidden,
        "hidden bias": dhidden.sum(0),
        "output": hidden.T @ dlogits,
        "output bias": dlogits.sum(0),
    }


def train(model, texts, epochs=EPOCHS):
    """By Adam; the mean loss of the last epoch."""
    before, after = (np.concatenate(parts) for parts in zip(*map(windows, texts), strict=True))
    rng = np.random.default_rng(0)
    first, second = ({name: np.zeros_like(a) for name, a in model.items()} for _ in range(2))
    batches = [b for _ in range(epochs) for b in np.array_split(rng.permutation(len(after)), len(after) // BATCH)]
    losses = []
    for step, batch in enumerate(tqdm(batches, desc="training", leave=False, disable=None), 1):
        loss, found = gradients(model, before[batch], after[batch])
        losses.append(loss)
        size = RATE * (1 - step / len(batches)) * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for name, g in found.items():
            first[name] += 0.1 * (g - first[name])
            second[name] += 0.001 * (g * g - second[name])
            model[name] -= size * first[name] / (np.sqrt(second[name]) + 1e-8)
    return float(np.mean(losses[-len(batches) // epochs :]))


# ---- quantisation ----------------------------------------------------------------------------------------------------


def rounded(weights, bits, block):
    """Each weight as one of 2^bits - 1 multiples of the scale of its block: of `block` weights that meet in one sum."""
    blocks = weights.T.reshape(weights.shape[1], -1, block)
    scale = np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    steps = np.rint(blocks / np.where(scale > 0, scale, 1))
    return (steps * scale).reshape(weights.T.shape).T.astype(np.float32)


def quantised(model, bits, blocks):
    """The matrices that are multiplied with; embeddings and biases stay, as they do in the field."""
    matrices = {name: model[name] for name in ("hidden", "output")}
    return model | {name: rounded(a, bits, 32 if blocks else len(a)) for name, a in matrices.items()}


# ---- the pictures ----------------------------------------------------------------------------------------------------


def draw(rows, reports, theme):
    """The KL of all tokens, for each way to quantise."""
    picture = figure(4.2)
    panel = picture.subplots()
    edges = np.geomspace(1e-6, 1, 121)
    for (name, kl), colour, line in zip(rows.items(), ("green", "blue", "orange"), ("-", "--", "-."), strict=True):
        r = reports[name]
        label = f"{name}: {r['kl']['mean']:.2g} ± {r['kl']['stderr']:.1g}, same token {r['same_top']['mean']:.1%}"
        panel.stairs(np.histogram(kl, edges)[0], edges, color=theme[colour], linestyle=line, linewidth=2, label=label)
    panel.axvline(LIMIT, color=theme["ink"], linewidth=1)
    panel.text(LIMIT, 1.01, f"limit of the mean: {LIMIT:g}", ha="center", transform=panel.get_xaxis_transform())
    panel.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(0, None), xlabel="KL of a token, nats", ylabel="tokens")
    head(picture, "Three quantisations of one model: mean KL ± error", panel.get_legend_handles_labels()[0], 1)
    return picture


def report_pictures(name):
    """The pictures of a report, for dark and for light pages: it has those for narrow screens last."""
    found = re.findall(r"data:image/svg\+xml;base64,([^'\"]+)", (OUTPUT / f"{name}.html").read_text())
    for kind, picture in zip(("dark", "light"), found[-2:], strict=True):
        (OUTPUT.parent / f"report-{kind}.svg").write_bytes(base64.b64decode(picture))


# ---- the comparison --------------------------------------------------------------------------------------------------


def write_logits(model, texts, name):
    logits = np.concatenate([forward(model, windows(text)[0])[2] for text in texts])
    np.save(OUTPUT / f"{name}.npy", logits)


def compare(base, quant, *options):
    """`klcore compare`, on the files in OUTPUT; the report as a dict, and the exit status."""
    path = OUTPUT / f"{quant}.json"
    arguments = ["compare", OUTPUT / f"{base}.npy", OUTPUT / f"{quant}.npy", "--json", path, "--force", *options]
    print(f"\n$ klcore {' '.join(Path(a).name if isinstance(a, Path) else a for a in arguments)}\n", flush=True)
    status = klcore_command([str(a) for a in arguments])
    return json.loads(path.read_text()), status


def main():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    trained_on, judged_by = load()
    model = new_model()
    loss = train(model, trained_on)
    print(f"trained on {sum(map(len, trained_on)):,} tokens: perplexity {np.exp(loss):.1f} there, at the end")

    np.save(OUTPUT / "tokens.npy", np.concatenate([windows(text)[1] for text in judged_by]))
    np.save(OUTPUT / "texts.npy", np.concatenate([np.full(len(t) - CONTEXT, k) for k, t in enumerate(judged_by)]))
    write_logits(model, judged_by, "float32")
    ways = {"8-bit": (8, True), "4-bit": (4, True), "4-bit-rows": (4, False)}
    for name, (bits, blocks) in ways.items():
        write_logits(quantised(model, bits, blocks), judged_by, name)

    found, statuses = {}, {}
    for name in ways:
        found[name], statuses[name] = compare(
            "float32", name, "--tokens", OUTPUT / "tokens.npy", "--groups", OUTPUT / "texts.npy",
            "--html", OUTPUT / f"{name}.html", "--plot", OUTPUT / f"{name}.png", "--max-mean", str(LIMIT),
        )  # fmt: skip

    print(f"\n{'':<12}{'mean KL':>10} ± {'error':<10}{'99 %':>9}{'same token':>12}{'ratio of PPL':>14}   <= {LIMIT:g}?")
    for name, r in found.items():
        kl, ratio = r["kl"], r["tokens"]["ratio"]
        print(
            f"{name:<12}{kl['mean']:>10.2e} ± {kl['stderr']:<10.2e}{kl['quantiles']['0.99']:>9.1e}"
            f"{r['same_top']['mean']:>12.2%}{ratio['mean']:>14.4f}   {'no' if statuses[name] else 'yes'}"
        )
    means = [r["kl"]["mean"] for r in found.values()]
    assert means == sorted(means), "fewer bits, and fewer scales, are further from the original"
    report_pictures("4-bit")
    base = np.load(OUTPUT / "float32.npy")
    rows = {name: klcore.kl_div(base, np.load(OUTPUT / f"{name}.npy"), space="logits") for name in ways}
    save("compare", lambda theme: draw(rows, found, theme))
    print(f"\nOpen {OUTPUT / '4-bit.html'} in a browser.")


if __name__ == "__main__":
    main()
