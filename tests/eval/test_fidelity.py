from dataclasses import replace

import numpy as np
import pytest
import torch

from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.harness.samples.samples import Samples


def value(name: str, evidence: Evidence) -> float:
    entry = evaluate([name], evidence)[name]
    assert entry["status"] == "ok", entry["reason"]
    low, high = entry["ci95"]
    assert low <= entry["value"] <= high and entry["paired"]
    return entry["value"]


def test_psnr_is_the_mean_of_each_images_psnr_and_not_that_of_the_pooled_error(evidence):
    a, b = evidence.generated.images_NHWC.numpy().astype(float), evidence.float_model.images_NHWC.numpy().astype(float)
    a[0] = 255 - b[0]  # one bad image: the two conventions now differ by several dB
    bad_first = replace(evidence.generated, pixels=torch.from_numpy(a.astype(np.uint8)))
    each = [20 * np.log10(255 / np.sqrt(np.mean((x - y) ** 2))) for x, y in zip(a, b, strict=True)]
    pooled = 20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2)))
    assert abs(np.mean(each) - pooled) > 3
    assert value("psnr", replace(evidence, generated=bad_first)) == pytest.approx(np.mean(each), abs=1e-9)


def test_psnr_of_one_level_everywhere_is_48_13_db():
    images = torch.full((3, 8, 8, 3), 100, dtype=torch.uint8)
    assert value("psnr", Evidence(Samples(images + 1), Samples(images))) == pytest.approx(20 * np.log10(255))


@pytest.mark.parametrize("name", ["psnr", "sqnr"])
def test_identical_samples_count_as_the_cap_that_the_passport_states(name, evidence):
    same = replace(evidence, generated=evidence.float_model)
    entry = evaluate([name], same)[name]
    assert entry["value"] == entry["passport"]["cap_db"] == 100.0


def wangs_ssim(x_HWC: np.ndarray, y_HWC: np.ndarray, sigma: float, radius: int) -> float:
    """Wang et al. 2004, eq. 13 to 17, place by place in float64: every window that lies inside the image, each channel alone."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum())[..., None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    places, size = [], 2 * radius + 1
    for top in range(x_HWC.shape[0] - size + 1):
        for left in range(x_HWC.shape[1] - size + 1):
            x, y = (image[top : top + size, left : left + size].astype(float) for image in (x_HWC, y_HWC))
            mx, my = ((weights * part).sum(axis=(0, 1)) for part in (x, y))
            vx, vy = (weights * (x - mx) ** 2).sum(axis=(0, 1)), (weights * (y - my) ** 2).sum(axis=(0, 1))
            covariance = (weights * (x - mx) * (y - my)).sum(axis=(0, 1))
            places.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(places))


@pytest.mark.parametrize(
    ("height", "width", "sigma", "radius"),
    [(16, 16, 1.5, 5), (16, 13, 1.5, 5), (8, 12, 3 / 3.5, 3), (3, 9, 1 / 3.5, 1)],
)
def test_ssim_is_wangs_formula_over_the_windows_that_lie_inside(evidence, height, width, sigma, radius):
    ours, theirs = (x.images_NHWC[:6, :height, :width] for x in (evidence.generated, evidence.float_model))
    expected = [wangs_ssim(x, y, sigma, radius) for x, y in zip(ours.numpy(), theirs.numpy(), strict=True)]
    assert np.mean(expected) < 0.99
    entry = evaluate(["ssim"], Evidence(Samples(ours), Samples(theirs)))["ssim"]
    assert entry["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert entry["passport"]["kernel_size"] == 2 * radius + 1 and "inside" in entry["passport"]["borders"]


def test_ssim_of_bright_flat_places_keeps_its_decimals():
    """In float32 E[x²] − E[x]² is lost there: 4e-4 of SSIM."""
    noise = np.random.default_rng(0).integers(-1, 2, (2, 32, 32, 3))
    ours, theirs = (torch.from_numpy((254 + each)[None].astype(np.uint8)).repeat(2, 1, 1, 1) for each in noise)
    expected = wangs_ssim(ours[0].numpy().astype(float), theirs[0].numpy().astype(float), 1.5, 5)
    assert value("ssim", Evidence(Samples(ours), Samples(theirs))) == pytest.approx(expected, abs=1e-6)


def test_ssim_is_scikit_images_number():
    """scikit-image 0.26.0: structural_similarity(one, other, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False). With reflected borders, as torchmetrics averages them, it would be 0.8308."""
    y, x, channel = np.mgrid[0:40, 0:48, 0:3]
    one = (x * 5 + y * 3 + 40 * channel) % 256
    other = np.clip(one + (x * 7 + y * 11) % 25 - 12 + 4 * channel, 0, 255)
    images = [Samples(torch.from_numpy(image.astype(np.uint8))[None].repeat(2, 1, 1, 1)) for image in (one, other)]
    assert value("ssim", Evidence(*images)) == pytest.approx(0.8445864594, abs=2e-6)


def test_a_videos_psnr_is_of_the_error_of_all_its_frames_and_its_ssim_the_mean_of_theirs():
    random = torch.Generator().manual_seed(0)
    theirs = torch.randint(40, 200, (2, 3, 12, 14, 3), generator=random)
    off = torch.tensor([1, 4, 20]).view(1, 3, 1, 1, 1) * torch.randint(-1, 2, theirs.shape, generator=random)
    ours, theirs = (theirs + off).to(torch.uint8), theirs.to(torch.uint8)
    evidence = Evidence(Samples(ours), Samples(theirs))
    x, y = ours.numpy().astype(float), theirs.numpy().astype(float)
    psnr = np.mean([10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(x, y, strict=True)])
    assert value("psnr", evidence) == pytest.approx(psnr, abs=1e-9)
    ssim = np.mean([wangs_ssim(a, b, 1.5, 5) for v, w in zip(x, y, strict=True) for a, b in zip(v, w, strict=True)])
    assert value("ssim", evidence) == pytest.approx(ssim, abs=2e-5)


def test_sqnr_divides_by_the_difference_and_takes_the_float_model_as_signal():
    signal = torch.full((2, 1, 2, 2), 2.0)
    noisy = signal * torch.tensor([1.1, 1.01]).view(2, 1, 1, 1)
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    evidence = Evidence(Samples(images, latents=noisy), Samples(images, latents=signal))
    assert value("sqnr", evidence) == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_fidelity_without_the_float_model_or_latents_is_skipped_with_a_reason(evidence):
    entries = evaluate(["psnr", "ssim", "sqnr"], replace(evidence, float_model=None))
    assert {entry["status"] for entry in entries.values()} == {"skipped"}
    assert all("float model" in entry["reason"] for entry in entries.values())
    no_latents = replace(evidence, generated=Samples(evidence.generated.images_NHWC))
    assert "latents" in evaluate(["sqnr"], no_latents)["sqnr"]["reason"]


def test_latents_of_a_diverged_sampler_are_skipped_and_not_recorded_as_nan(evidence):
    latents = evidence.generated.latents.clone()
    latents[3] = float("nan")
    broken = replace(evidence, generated=replace(evidence.generated, latents=latents))
    assert "not finite" in evaluate(["sqnr"], broken)["sqnr"]["reason"]


def test_sets_that_do_not_pair_row_by_row_are_an_error(evidence):
    fewer = replace(evidence, float_model=Samples(evidence.float_model.images_NHWC[:-1]))
    with pytest.raises(ValueError, match="same seeds"):
        known_metrics()["psnr"].compute(fewer)
    entry = evaluate(["psnr"], fewer)["psnr"]
    assert (entry["status"], entry["value"]) == ("failed", None) and "same seeds" in entry["reason"]
