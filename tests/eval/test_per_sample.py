"""What a metric keeps of each sample is what its value is made of; shares have Wilson's interval also at 0 % and 100 %."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import t

from ditbench.eval.base import Evidence, evaluate_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.statistics import WILSON, WILSON_OF_GROUPS
from ditbench.harness.models.zoo import shapes
from ditbench.harness.samples.samples import Prompt, Samples

CATEGORIES = ("colors", "colors", "colors", "single_object", "counting", "counting")


def pictures(rightly: bool = True) -> Samples:
    """One picture per prompt, unequal numbers per category; wrong ones show the next prompt's scene."""
    drawn = random.Random(0)
    captions = [shapes.random_caption(kind, drawn) for kind in CATEGORIES]
    images = np.stack([shapes.render(shapes.draw_scene(caption, drawn)) for caption in captions])
    prompts = tuple(Prompt(caption.text, caption.about) for caption in captions)
    return Samples(torch.from_numpy(images if rightly else np.roll(images, 1, axis=0)), prompts=prompts)


def videos(rightly: bool = True) -> Samples:
    drawn = random.Random(0)
    motions = [shapes.random_motion(drawn) for _ in range(4)]
    frames = np.stack([shapes.draw_video(motion, drawn, 6, 24) for motion in motions])
    prompts = tuple(Prompt(motion.text, motion.about) for motion in motions)
    return Samples(torch.from_numpy(frames if rightly else np.zeros_like(frames)), prompts=prompts)


@pytest.mark.parametrize("name", ["psnr", "sqnr", "accuracy", "collapse"])
def test_the_value_is_the_mean_of_what_is_kept(name, evidence):
    entries, samples = evaluate_samples([name], evidence)
    kept = samples[name]
    assert kept.values_N.shape == (96,) and kept.strata_N is None
    assert entries[name]["value"] == pytest.approx(kept.values_N.mean())
    assert kept.yes_no == (name in ("accuracy", "collapse"))
    assert entries[name]["passport"]["ci_method"].startswith(WILSON if kept.yes_no else "Student's t")


@pytest.mark.parametrize(
    "name",
    [
        "torchmetrics/fid_judge",
        "torch_fidelity/kid_judge",
        "torch_fidelity/is_judge",
        "torch_fidelity/recall_judge",
        "fd_infinity_judge",
    ],
)
def test_metrics_of_the_whole_set_keep_what_each_sample_contributes_and_its_mean_is_the_value(name, evidence):
    entries, samples = evaluate_samples([name], evidence)
    kept = samples[name]
    assert kept.pseudo and not kept.yes_no and kept.values_N.shape == (96,) and kept.values_N.std() > 0
    assert kept.values_N.mean() == pytest.approx(entries[name]["value"])
    assert kept.design_N.tolist() == [index % 10 for index in range(96)]
    assert entries[name]["passport"]["design"] == "balanced labels (10 in turn)"


SHARES = ["geneval_shapes/colors", "motion_shapes/object", "vbench_style/dynamic_degree", "collapse"]


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("rightly", [True, False])
def test_a_share_of_all_or_none_has_an_interval_with_a_width(name, rightly):
    make = pictures if name.startswith("geneval") else videos
    found = Evidence(make(rightly), make(), resamples=20)
    entry = evaluate_samples([name], found)[0][name]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["passport"]["ci_method"] == WILSON
    if entry["value"] in (0.0, 1.0):
        assert entry["ci95"][1] - entry["ci95"][0] > 0.3


def test_genevals_total_is_the_mean_of_the_categories_that_are_kept():
    images = pictures()
    images.pixels[2] = 0  # one of the three of "colors" goes blank
    entries, samples = evaluate_samples(["geneval_shapes/overall", "geneval_shapes/colors"], Evidence(images))
    total, kept = entries["geneval_shapes/overall"], samples["geneval_shapes/overall"]
    assert kept.values_N.tolist() == [1, 1, 0, 1, 1, 1] and kept.strata_N.tolist() == [0, 0, 0, 1, 2, 2]
    by_category = [kept.values_N[kept.strata_N == category].mean() for category in range(3)]
    assert total["value"] == pytest.approx(np.mean(by_category)) and total["value"] != pytest.approx(5 / 6)
    assert total["passport"]["ci_method"] == WILSON_OF_GROUPS and total["n"] == 6
    colours = samples["geneval_shapes/colors"]
    assert colours.strata_N is None and np.isnan(colours.values_N[3:]).all()
    assert entries["geneval_shapes/colors"]["passport"]["ci_method"] == WILSON and np.nanmean(colours.values_N) == 2 / 3


def test_videos_of_another_dimension_do_not_count():
    made = videos()
    about = [{"dimension": ["temporal_flickering"]}, {"dimension": ["scene"]}] * 2
    made = Samples(made.pixels, prompts=tuple(Prompt("x", each) for each in about))
    name = "vbench_style/temporal_flickering"
    entries, samples = evaluate_samples([name], Evidence(made, resamples=20))
    assert np.isnan(samples[name].values_N).tolist() == [False, True, False, True] and entries[name]["n"] == 2
    assert entries[name]["value"] == pytest.approx(np.nanmean(samples[name].values_N))


def test_every_alarm_of_collapse_has_wilsons_interval():
    entry = evaluate_samples(["collapse"], Evidence(videos(rightly=False), videos()))[0]["collapse"]
    assert entry["value"] == 1.0
    for alarm in entry["passport"]["alarms"].values():
        assert alarm["ci95"][0] <= alarm["share"] <= alarm["ci95"][1] and alarm["ci95"][1] - alarm["ci95"][0] > 0.3


def test_a_mean_over_balanced_labels_has_the_interval_of_its_spread_within_labels():
    labels_N = torch.arange(12) % 3
    pixels = torch.zeros(12, 4, 4, 3, dtype=torch.uint8)
    values_N = np.array([0.0, 10.0, 20.0] * 4) + np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    found = mean_or_share(Evidence(Samples(pixels, labels_N)), values_N, "test", "ditbench", dtype="float64")
    variance = (
        3 * 4 * np.var([0, 1, 2, 3], ddof=1) / 12**2
    )  # Σ m s² / n²: each label's four values are 0, 1, 2, 3 above its own
    assert found.value == pytest.approx(11.5)
    assert found.ci95 == pytest.approx([11.5 - t.ppf(0.975, 9) * variance**0.5, 11.5 + t.ppf(0.975, 9) * variance**0.5])
    plain = mean_or_share(Evidence(Samples(pixels)), values_N, "test", "ditbench", dtype="float64")
    assert plain.ci95[1] - plain.ci95[0] > 5 * (found.ci95[1] - found.ci95[0])
