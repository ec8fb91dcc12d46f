"""Values per sample beside a record, the float model's with them, and noise floors of metrics that need prompts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ditbench.eval.base import Evidence, PerSample, evaluate
from ditbench.harness.models.zoo import shapes
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import read_all
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.harness.stages import evaluate as stage

SWEEP = ("method=rtn,smoothquant", "bits=w4a4", "metrics.names=[psnr,accuracy,torchmetrics/fid_judge]", "name=two")


@pytest.fixture
def scored_floats(monkeypatch):
    """Names of metrics that were computed on samples of the float model, in turn."""
    names, real = [], stage._of_one

    def counting(name, evidence):
        if evidence.generated is evidence.float_model:
            names.append(name)
        return real(name, evidence)

    monkeypatch.setattr(stage, "_of_one", counting)
    return names


def test_each_run_keeps_its_values_and_the_float_models_which_are_scored_once(request, tmp_path, scored_floats):
    assert request.getfixturevalue("run")("-m", *SWEEP) == 0
    first, second = read_all(tmp_path)
    kept = [sample_values.load(each.folder / each.artifacts["per_sample"]) for each in (first, second)]
    of_two_seeds = ["accuracy", "torchmetrics/fid_judge"] * 2  # of the noise floor
    assert scored_floats == ["accuracy", *of_two_seeds], "the second run finds them"
    for record, values in zip((first, second), kept, strict=True):
        assert set(values.run) == {"psnr", "accuracy"} and set(values.float_model) == {"accuracy"}
        for name, one in values.run.items():
            assert one.values_N.shape == (4,) and one.values_N.mean() == pytest.approx(
                record.metrics[name]["value"], rel=1e-6
            )
        assert values.run["accuracy"].yes_no and not values.run["psnr"].yes_no
    assert kept[0].drawn == kept[1].drawn
    assert (kept[0].float_model["accuracy"].values_N == kept[1].float_model["accuracy"].values_N).all()


def test_values_are_read_as_they_were_written(tmp_path):
    values_N = np.array([0.5, np.nan, -3.0])
    strata = PerSample(np.array([1.0, 0.0, 1.0]), True, np.array([0, 1, 1]))
    written = sample_values.Values({"a/b": PerSample(values_N), "c": strata}, {"c": strata}, "key")
    sample_values.save(written, tmp_path / "values.npz")
    read = sample_values.load(tmp_path / "values.npz")
    np.testing.assert_array_equal(read.run["a/b"].values_N, values_N)
    assert not read.run["a/b"].yes_no and read.run["a/b"].strata_N is None
    assert read.run["c"].yes_no and read.float_model["c"].strata_N.tolist() == [0, 1, 1] and read.drawn == "key"


def test_other_prompts_labels_or_seeds_do_not_pair():
    pixels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    drawn = {
        sample_values.drawn(Samples(pixels, prompts=(Prompt("a"), Prompt("b"))), 0),
        sample_values.drawn(Samples(pixels, prompts=(Prompt("b"), Prompt("a"))), 0),
        sample_values.drawn(Samples(pixels, prompts=(Prompt("a"), Prompt("b"))), 1),
        sample_values.drawn(Samples(pixels, torch.tensor([0, 1])), 0),
    }
    assert len(drawn) == 4


def pictures(seed):
    drawn = random.Random(0)
    captions = [shapes.random_caption(kind, drawn) for kind in shapes.KINDS]
    images = np.stack([shapes.render(shapes.draw_scene(caption, random.Random(seed))) for caption in captions])
    images[:seed] = 0  # the more, the worse
    return Samples(torch.from_numpy(images), prompts=tuple(Prompt(each.text, each.about) for each in captions))


def videos(seed):
    drawn = random.Random(0)
    motions = [shapes.random_motion(drawn) for _ in range(4)]
    frames = np.stack([shapes.draw_video(motion, random.Random(seed), 4, 24) for motion in motions])
    frames[:seed] = 0
    return Samples(torch.from_numpy(frames), prompts=tuple(Prompt(each.text, each.about) for each in motions))


@pytest.mark.parametrize(
    ("make", "names", "expected"),
    [
        (pictures, ["geneval_shapes/overall", "collapse", "psnr"], {"geneval_shapes/overall": 2 / 6, "collapse": 0.0}),
        (videos, ["motion_shapes/object", "flow_score", "psnr"], {"motion_shapes/object": 2 / 4}),
    ],
)
def test_the_noise_floor_of_text_to_image_and_video_metrics_is_the_spread_over_seeds(
    make, names, expected, monkeypatch
):
    def scored(names, ours, theirs):
        return evaluate(names, Evidence(ours, theirs, resamples=5))

    monkeypatch.setattr(stage, "scored", lambda config, model, ours, theirs, names: (scored(names, ours, theirs), {}))
    metrics = scored(names, make(0), make(0))
    stage.write_noise_floor(None, None, metrics, [make(seed) for seed in range(3)])
    assert metrics["psnr"]["noise_floor"] is None
    for name, floor in expected.items():
        assert metrics[name]["noise_floor"] == pytest.approx(floor)
    if "flow_score" in names:
        assert metrics["flow_score"]["noise_floor"] > 0


def test_a_metric_that_cannot_run_on_every_seed_has_no_noise_floor():
    assert stage.spread([1.0, None, 3.0]) is None and stage.spread([1.0, 5.0, 3.0]) == 4.0
