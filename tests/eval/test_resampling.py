"""The resampled statistics are the libraries' statistics, and their spread is that of fresh samples."""

import numpy as np
import pytest
import torch

from ditbench.eval import libraries, resampling
from ditbench.eval.statistics import bootstrap_sd

WIDTH = 6


def gaussian(n: int, seed: int, shift: float = 0.0, width: int = WIDTH) -> torch.Tensor:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return torch.from_numpy((random.normal(size=(n, width)) @ mixing + shift).astype(np.float32))


@pytest.mark.parametrize(("n", "width"), [(80, 6), (20, 40)])
def test_the_resampled_frechet_distance_is_the_libraries_also_with_fewer_images_than_features(n, width):
    generated, reference = gaussian(n, 0, 0.3, width), gaussian(200, 1, 0.0, width)
    distance = resampling.frechet(generated.numpy(), reference.numpy())
    rows = np.random.default_rng(0).integers(0, n, n)
    expected, _ = libraries.torch_fidelity_fid(generated[rows], reference, 0)
    assert distance(rows) == pytest.approx(expected, rel=1e-4)


def test_the_resampled_recall_is_torch_fidelitys():
    generated, reference = gaussian(60, 0, 0.5), gaussian(90, 1)
    _, expected, settings = libraries.torch_fidelity_prc(generated, reference)
    assert 0.05 < expected < 0.95
    assert resampling.recall(generated, reference, settings["neighbours"])(np.arange(60)) == pytest.approx(expected)


def test_the_kernel_bootstrap_in_blocks_is_a_loop_over_resamples(monkeypatch):
    generated, reference = gaussian(30, 0, 0.3).numpy(), gaussian(50, 1).numpy()
    values = []
    for rows in np.random.default_rng(5).integers(0, 30, size=(40, 30)):
        x, y = generated[rows].astype(np.float64), reference.astype(np.float64)
        k_xx, k_xy = (x @ x.T / WIDTH + 1) ** 3, (x @ y.T / WIDTH + 1) ** 3
        values.append((k_xx.sum() - np.trace(k_xx)) / (30 * 29) - 2 * k_xy.mean())
    monkeypatch.setattr(resampling, "KERNEL_ROWS", 7)
    assert resampling.kernel_sd(generated, reference, seed=5, resamples=40) == pytest.approx(np.std(values, ddof=1))


def fresh_sd(statistic, n, draws=120):
    return np.std([statistic(gaussian(n, 1000 + draw, 0.3)) for draw in range(draws)], ddof=1)


def test_intervals_are_as_wide_as_fresh_samples_vary():
    """Against the truth that resampling stands for: other samples of the same distribution, same reference."""
    reference, generated, n = gaussian(400, 1), gaussian(150, 0, 0.3), 150
    nearest = libraries.NEIGHBOURS
    cases = {
        "fid": (
            bootstrap_sd(resampling.frechet(generated.numpy(), reference.numpy()), n, 0, 200),
            fresh_sd(lambda x: libraries.torch_fidelity_fid(x, reference, 0)[0], n),
        ),
        "recall": (
            resampling.halves_sd(resampling.recall(generated, reference, nearest), n, 0),
            fresh_sd(lambda x: libraries.torch_fidelity_prc(x, reference)[1], n),
        ),
        "is": (
            resampling.inception_score_sd(generated.numpy(), 1, 0, 200),
            fresh_sd(lambda x: libraries.torch_fidelity_is(x, 0)[0], n),
        ),
    }
    for name, (ours, truth) in cases.items():
        assert 0.6 < ours / truth < 1.7, (name, ours, truth)


def test_the_kernel_interval_is_as_wide_as_fresh_samples_vary(monkeypatch):
    monkeypatch.setattr(libraries, "KID_SUBSETS", 20)
    reference, generated = gaussian(400, 1), gaussian(150, 0, 0.3)
    truth = fresh_sd(lambda x: libraries.torch_fidelity_kid(x, reference, 0)[0], 150, draws=40)
    assert 0.6 < resampling.kernel_sd(generated.numpy(), reference.numpy(), 0, 200) / truth < 1.7


def test_wide_features_get_fewer_resamples():
    assert resampling.frechet_resamples(64, 200) == 200
    assert resampling.frechet_resamples(2048, 200) == resampling.FEW_RESAMPLES
    assert resampling.frechet_resamples(2048, 10) == 10


def test_pairs_are_drawn_together_in_the_frechet_distance_of_pairs():
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 4))
    y = x + 0.1 * random.normal(size=(30, 4))
    rows = random.integers(0, 30, 30)
    expected = resampling.frechet(x[rows], y[rows])(np.arange(30))
    assert resampling.frechet_of_pairs(x, y)(rows) == expected < 0.3 * resampling.frechet(x, y)(rows)
    assert resampling.frechet_of_pairs(x, x)(rows) == pytest.approx(0.0, abs=1e-9)
