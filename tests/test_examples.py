"""The examples' parts that can be wrong without their pictures looking wrong."""

import importlib
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("no examples beside the tests: these are of an installed package", allow_module_level=True)
pytest.importorskip("matplotlib", reason="matplotlib is not installed here")


@pytest.fixture
def example(monkeypatch):
    """Imports a file of examples/."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_the_nearest_gaussians(example):
    """As docs/choosing.md has them."""
    direction = example("direction")
    found = [np.round(numbers, 2).tolist() for _, *numbers in direction.nearest(direction.mixture())]
    assert found == [[-0.4, 2.05, 0.56], [-2.0, 0.6, 0.51]]


def test_alarms_by_chance_are_rare(example):
    pytest.importorskip("pandas", reason="pandas is not installed here")
    drift = example("drift")
    rng = np.random.default_rng(0)
    alarms, distribution = [], rng.dirichlet(np.full(10, 10.0))
    for _ in range(400):
        counts = rng.multinomial(rng.integers(400, 1600, 50), distribution)
        kl, noise, limit = drift.watch(counts)
        alarms.append(kl[drift.REFERENCE :] > limit[drift.REFERENCE :])
    assert drift.RATE / 2 < np.mean(alarms) < 2 * drift.RATE
    assert (noise < limit).all()


def test_drift_is_found(example):
    pytest.importorskip("pandas", reason="pandas is not installed here")
    drift = example("drift")
    counts, bounds = drift.histograms(drift.orders())
    assert [of.shape for of in counts.values()] == [(drift.WEEKS, drift.BINS), (drift.WEEKS, len(drift.PAYMENTS))]
    assert len(bounds) == drift.BINS + 1
    alarms = {}
    for name, of in counts.items():
        kl, _, limit = drift.watch(of)
        alarms[name] = np.flatnonzero(kl > limit).tolist()
    assert alarms["payment"] == list(drift.CAMPAIGN)
    assert alarms["amount"] == list(range(21, drift.WEEKS))


@pytest.mark.exhaustive
def test_the_autoencoder_learns(example, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed here")
    vae = example("vae_digits")
    assert vae.divergence(torch.zeros(3, vae.LATENTS, vae.CLASSES)).max() < 1e-20
    sure = 1e3 * torch.nn.functional.one_hot(torch.arange(vae.CLASSES)).float()
    torch.testing.assert_close(vae.divergence(sure), torch.full((vae.CLASSES,), vae.CLASSES).log())
    monkeypatch.setattr(vae, "EPOCHS", 4)
    images, test_images = vae.load()
    torch.manual_seed(0)
    before, _ = vae.judge(vae.Autoencoder(), test_images)
    plain, free = (vae.train(images[:512], test_images, **vae.WAYS[name]) for name in ("plain", "free bits"))
    for model, history in (plain, free):
        after, again = vae.judge(model, test_images)
        assert after < 0.9 * before
        assert again.shape == test_images.shape
        assert history.shape == (4, vae.LATENTS)
    assert free[1][-1].sum() > 2 * plain[1][-1].sum()
