"""A variational autoencoder with categorical latents, in PyTorch, on the handwritten digits of scikit-learn.

The encoder turns an image into the logits of 8 latents with 8 classes each. The decoder gets one class of each latent,
drawn by the Gumbel-softmax (Jang, Gu and Poole, 2017; Maddison, Mnih and Teh, 2017). The loss is the negative ELBO: the
cross-entropy of the pixels, plus the KL of the latents from a uniform prior, ``klcore.kl_div(logits, prior,
space=("logits", "probs"))``, one value per image and latent.

These values tell which latents carry anything. The model is trained three times from the same weights: plainly; with
KL annealing (Bowman et al., 2016), which raises the weight of the KL from 0 to 1; and with free bits (Kingma et al.,
2016), which charge a latent only for what exceeds a threshold.

Run it with ``make examples``, or (half a minute)::

    pip install "klcore[examples]"
    python examples/vae_digits.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from style import figure, head, save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import klcore

LATENTS, CLASSES = 8, 8
PRIOR = torch.full((CLASSES,), 1 / CLASSES)
HIDDEN = 128
EPOCHS, BATCH, RATE = 100, 64, 5e-3
COLD = 0.3  # the last temperature of the Gumbel-softmax; the first is 1
WAYS = {"plain": {}, "annealed": {"warm_up": EPOCHS // 2}, "free bits": {"free": 0.5}}  # epochs; nats per latent
LITTLE = 0.05  # nats: a latent below carries nothing
SHOWN = 8  # test images in the picture


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENTS * CLASSES))
        self.decoder = nn.Sequential(nn.Linear(LATENTS * CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))

    def encode(self, images):
        """Logits of the latents: (images, latents, classes)."""
        return self.encoder(images).unflatten(-1, (LATENTS, CLASSES))

    def decode(self, z):
        """Logits of the pixels, of latents as rows of probabilities."""
        return self.decoder(z.flatten(-2))


def divergence(logits):
    """KL of the latents from the prior: one value per image and latent, in nats."""
    return klcore.kl_div(logits, PRIOR, space=("logits", "probs"))


def reconstruction(pixels, images):
    """Cross-entropy of each image, summed over its pixels, which are shades between 0 and 1."""
    return F.binary_cross_entropy_with_logits(pixels, images, reduction="none").sum(-1)


def load():
    """Images as rows of 64 pixels in 0..1: 1,347 to train with, 450 to test."""
    images = torch.from_numpy(load_digits().data / 16).float()
    return train_test_split(images, test_size=0.25, random_state=0)


def train(images, test_images, free=0.0, warm_up=1):
    """The model, and by epoch the mean KL of each latent on the test images."""
    torch.manual_seed(0)
    model, history = Autoencoder(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    # disable=None: a bar on terminals only
    for epoch in tqdm(range(EPOCHS), desc="training", leave=False, disable=None):
        temperature, weight = COLD ** (epoch / (EPOCHS - 1)), min(1, (epoch + 1) / warm_up)
        for batch in images[torch.randperm(len(images))].split(BATCH):
            logits = model.encode(batch)
            z = F.gumbel_softmax(logits, tau=temperature)
            kl = divergence(logits).mean(0)  # per latent
            loss = reconstruction(model.decode(z), batch).mean() + weight * kl.clamp(min=free).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(divergence(model.encode(test_images)).mean(0))
    return model, torch.stack(history)


@torch.no_grad()
def judge(model, images):
    """The negative ELBO of a drawn latent, the mean over images; and the images that the likeliest classes give."""
    logits = model.encode(images)
    drawn = torch.distributions.OneHotCategorical(logits=logits).sample()
    loss = reconstruction(model.decode(drawn), images) + divergence(logits).sum(-1)
    return loss.mean(), model.decode(F.one_hot(logits.argmax(-1), CLASSES).float()).sigmoid()


def draw(images, rebuilt, histories, theme):
    """Above: test images, and what comes back. Below: the KL of each latent by epoch."""
    picture = figure(9.2)
    above, below = picture.subfigures(2, 1, height_ratios=[1, 1.5])
    rows = {"image": images, **rebuilt}
    for panel, (name, of) in zip(above.subplots(len(rows), 1), rows.items(), strict=True):
        panel.imshow(torch.hstack(list(F.pad(of.reshape(-1, 8, 8), (1, 1, 1, 1)))), cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
    panels = below.subplots(len(histories), 1, sharex=True, sharey=True)
    top = max(history[-1].max() for history in histories.values())
    for panel, (name, history) in zip(panels, histories.items(), strict=True):
        panel.plot(np.arange(1, EPOCHS + 1), history, color=theme["blue"], linewidth=1.2)
        unused = int((history[-1] < LITTLE).sum())
        panel.set(title=f"{name}: {unused} of {LATENTS} latents carry nothing", ylim=(0, 1.1 * top))
    panels[1].set_ylabel("KL of a latent, nats")
    panels[-1].set_xlabel("epoch")
    head(above, "Posterior collapse shows in the KL of each latent")
    return picture


def main():
    torch.set_num_threads(1)
    klcore.set_num_threads(1)
    images, test_images = load()
    print(f"{len(images)} images to train with, {len(test_images)} to test; klcore {klcore.__version__}\n")
    print(f"{'nats':<12}{'-ELBO':>8}{'KL':>8}   of each latent, in ascending order")
    rebuilt, histories = {}, {}
    for name, way in WAYS.items():
        model, histories[name] = train(images, test_images, **way)
        loss, again = judge(model, test_images)
        rebuilt[name], kl = again[:SHOWN], histories[name][-1]
        each = " ".join(f"{value:.2f}" for value in kl.sort().values)
        print(f"{name:<12}{loss:>8.2f}{kl.sum():>8.2f}   {each}", flush=True)
    print()
    save("vae_digits", lambda theme: draw(test_images[:SHOWN], rebuilt, histories, theme))


if __name__ == "__main__":
    main()
