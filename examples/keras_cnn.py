"""Train a convolutional network with Keras on the Kullback-Leibler divergence: klcore's, Keras' own, and cross-entropy.

The network is that of a well-known tutorial on this loss in Keras: twice convolution, pooling and dropout, then two
dense layers and a softmax. Here it is cut to the 1,797 handwritten digits of scikit-learn, 8 by 8 pixels each, and the
loss is ``klcore.compat.keras.kullback_leibler_divergence``, by the long name that Keras 3 no longer has.

The same network is trained three times, from the same weights, on the same batches and with the same dropout: with
klcore's loss, with ``keras.losses.kl_divergence``, and with the categorical cross-entropy, which for labels that are 0
or 1 is the same number but for the clipping of Keras' divergence. The first two must agree to four digits in every
epoch, or this script fails. The arithmetic is float64 for that reason: differences of rounding grow in training, and
those of float32 reach the third digit within a dozen epochs.

Run it with ``make examples``, or (about half a minute)::

    pip install "klcore[examples]"
    python examples/keras_cnn.py

KERAS_BACKEND chooses the library that Keras computes with: "torch" (the default here), "jax" or "tensorflow".
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras is imported
os.environ.setdefault("JAX_ENABLE_X64", "1")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from style import figure, head, save
from tqdm import tqdm

import klcore
from klcore.compat.keras import kullback_leibler_divergence

EPOCHS = 25
BATCH = 32
AGREEMENT = 1e-4  # relative: what klcore's and Keras' losses of an epoch may differ by
OURS, THEIRS, CROSS = "klcore", "Keras' own", "cross-entropy"
LOSSES = {
    OURS: kullback_leibler_divergence,
    THEIRS: keras.losses.kl_divergence,
    CROSS: keras.losses.categorical_crossentropy,
}
WORST = 8  # test images that the picture shows


def prepare():
    keras.config.set_floatx("float64")
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)  # layers this small have no work for two


def load():
    """Images of shape (8, 8, 1) in 0..1, and labels as rows of zeros and a one: 1,347 to train with, 450 to test."""
    digits = load_digits()
    images, labels = digits.images[..., np.newaxis] / 16, np.eye(10)[digits.target]
    return train_test_split(images, labels, test_size=0.25, stratify=digits.target, random_state=0)


def network():
    """The tutorial's layers, narrower. It has 28 by 28 pixels; "same" keeps 8 by 8 from vanishing."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.5),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.5),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def train(loss, images, labels, test, on_epoch):
    """Train a network from scratch; returns it, and losses and accuracies by epoch, those of the test data too."""
    keras.utils.set_random_seed(0)  # weights, order of the batches, dropout
    net = network()
    net.compile(loss=loss, optimizer=keras.optimizers.Adam(), metrics=["accuracy"])
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: on_epoch())
    fit = net.fit(images, labels, BATCH, EPOCHS, verbose=0, validation_data=test, callbacks=[callback])
    return net, {name: np.array(values) for name, values in fit.history.items()}


def report(histories, nets, seconds):
    """Print the runs side by side; returns the largest relative difference of klcore's losses from Keras' own."""
    ours, theirs = histories[OURS]["loss"], histories[THEIRS]["loss"]
    difference = np.abs(ours - theirs) / theirs
    print("Training loss, in nats; the difference is that of the first two, relative")
    print(f"{'epoch':>5}" + "".join(f"{name:>15}" for name in histories) + f"{'difference':>13}")
    for epoch in range(EPOCHS):
        row = "".join(f"{history['loss'][epoch]:15.7f}" for history in histories.values())
        print(f"{epoch + 1:5}{row}{difference[epoch]:13.0e}")

    print(f"\nAfter {EPOCHS} epochs; {nets[OURS].count_params():,} parameters")
    print(f"  {'loss':<14}{'test accuracy':>14}{'weights differ by':>19}{'seconds':>9}")
    for name, history in histories.items():
        pairs = zip(nets[name].get_weights(), nets[OURS].get_weights(), strict=True)
        apart = max(np.abs(a - b).max() for a, b in pairs)
        print(f"  {name:<14}{history['val_accuracy'][-1]:>14.1%}{apart:>19.0e}{seconds[name]:>9.1f}")
    return difference.max()


def draw(histories, images, labels, predictions, theme):
    """Losses and accuracies by epoch, and the test images whose divergence is largest."""
    styles = {
        OURS: {"color": theme["blue"], "linewidth": 6, "alpha": 0.5},
        THEIRS: {"color": theme["orange"], "linewidth": 1.6},
        CROSS: {"color": theme["green"], "linestyle": "none", "marker": "o", "markersize": 5, "fillstyle": "none"},
    }
    picture = figure(7.6)
    curves, worst = picture.subfigures(2, 1, height_ratios=[1, 1.25])
    loss, right = curves.subplots(1, 2)
    epochs = np.arange(1, EPOCHS + 1)
    for name, style in styles.items():
        loss.semilogy(epochs, histories[name]["loss"], label=name, **style)
        right.plot(epochs, 100 * histories[name]["val_accuracy"], **style)
    ticks = [0.2, 0.5, 1, 2]
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.set_yticks([], minor=True)
    loss.set(title="training loss, nats", xlabel="epoch")
    right.set(title="test images right, %", xlabel="epoch", ylim=(40, 102))

    divergences = klcore.kl_div(labels, predictions)  # one for each image
    worst.suptitle("test images furthest from their label", size=12)
    order = np.argsort(divergences)[::-1][:WORST]
    for panel, i in zip(worst.subplots(2, WORST // 2).flat, order, strict=True):
        panel.imshow(images[i, ..., 0], cmap="gray_r")
        label, guess = labels[i].argmax(), predictions[i].argmax()
        panel.set_title(f"{label}" if guess == label else f"{label}, read as {guess}", loc="center")
        panel.set_xlabel(f"{divergences[i]:.2f} nats")
        panel.set(xticks=[], yticks=[])
        panel.grid(visible=False)
    head(curves, f"Keras on {keras.backend.backend()}: one seed, three losses", loss.lines)
    return picture


def main():
    prepare()
    images, test_images, labels, test_labels = load()
    print(
        f"{len(images)} images to train with, {len(test_images)} to test; klcore {klcore.__version__}, "
        f"Keras {keras.__version__} on {keras.backend.backend()}\n"
    )
    nets, histories, seconds = {}, {}, {}
    # disable=None: a bar on terminals only
    with tqdm(total=EPOCHS * len(LOSSES), desc="training", unit="epoch", leave=False, disable=None) as bar:
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            nets[name], histories[name] = train(loss, images, labels, (test_images, test_labels), bar.update)
            seconds[name] = time.perf_counter() - start

    largest = report(histories, nets, seconds)
    predictions = nets[OURS].predict(test_images, verbose=0)
    save("keras_cnn", lambda theme: draw(histories, test_images, test_labels, predictions, theme))
    if not largest <= AGREEMENT:
        raise SystemExit(f"klcore's loss and Keras' own differ by {largest:.0e} relative in an epoch")


if __name__ == "__main__":
    main()
