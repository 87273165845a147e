"""The direction of KL(x || y): the Gaussian nearest to a mixture of two, forward and reverse. Draws a picture.

Forward, KL(truth || model), covers both modes; reverse, KL(model || truth), keeps to one.

    python examples/direction.py
"""

import numpy as np
from style import figure, head, save

import klcore

GRID = np.linspace(-10, 10, 401)
MEAN, SD = np.linspace(-4, 4, 81), np.linspace(0.2, 4, 77)


def mixture():
    """60 % at -2 and 40 % at 2, both with a standard deviation of 0.6."""
    density = 0.6 * np.exp(-((GRID + 2) ** 2) / 0.72) + 0.4 * np.exp(-((GRID - 2) ** 2) / 0.72)
    return density / density.sum()


def nearest(truth):
    """Mean and standard deviation of the Gaussian with the least divergence, by direction."""
    models = -(((GRID - MEAN[:, None, None]) / SD[:, None]) ** 2) / 2  # the logits of 81 x 77 Gaussians
    divergences = {
        "forward": klcore.kl_div(truth, models, space=("probs", "logits")),
        "reverse": klcore.kl_div(models, truth, space=("logits", "probs")),
    }
    for direction, kl in divergences.items():
        i, j = np.unravel_index(kl.argmin(), kl.shape)
        yield direction, MEAN[i], SD[j], kl[i, j]


def draw(truth, found, theme):
    picture = figure(3.8)
    panel = picture.subplots()
    step = GRID[1] - GRID[0]
    panel.fill_between(GRID, truth / step, color=theme["grey"], alpha=0.4, linewidth=0)
    panel.text(2.7, 0.17, "truth")
    looks = {
        "forward": ("blue", "-", "KL(truth || model): covers both", (-0.2, 0.32)),
        "reverse": ("orange", "--", "KL(model || truth): keeps to one", (-1.3, 0.58)),
    }
    for direction, mean, sd, _ in found:
        colour, line, words, at = looks[direction]
        density = np.exp(-(((GRID - mean) / sd) ** 2) / 2) / (sd * np.sqrt(2 * np.pi))
        panel.plot(GRID, density, color=theme[colour], linestyle=line, linewidth=2.4)
        panel.text(*at, f"{direction}, {words}\nmean {mean:.1f}, sd {sd:.2f}", color=theme[colour], va="center")
    panel.set(xlim=(-6, 6), ylim=(0, None), yticks=[])
    panel.grid(visible=False)
    panel.spines["left"].set_visible(False)
    head(picture, "The Gaussian nearest to two modes depends on the direction")
    return picture


def main():
    truth = mixture()
    found = list(nearest(truth))
    for direction, mean, sd, kl in found:
        print(f"{direction}: mean {mean:.1f}, sd {sd:.2f}, {kl:.2f} nats")
    save("direction", lambda theme: draw(truth, found, theme))


if __name__ == "__main__":
    main()
