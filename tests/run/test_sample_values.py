"""Values per sample beside a record, the float model's with them, and noise floors of metrics that need prompts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ditbench.eval.base import Evidence, PerSample, evaluate_samples
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
    assert scored_floats == ["accuracy", "torchmetrics/fid_judge", *of_two_seeds], "the second run finds them"
    for record, values in zip((first, second), kept, strict=True):
        assert set(values.run) == {"psnr", "accuracy", "torchmetrics/fid_judge"}
        assert set(values.float_model) == {"accuracy", "torchmetrics/fid_judge"}
        assert values.run["torchmetrics/fid_judge"].pseudo and not values.run["psnr"].pseudo
        for name, one in values.run.items():
            assert one.values_N.shape == (4,) and one.values_N.mean() == pytest.approx(
                record.metrics[name]["value"], rel=1e-5
            )
        assert values.run["accuracy"].yes_no and not values.run["psnr"].yes_no
    assert kept[0].drawn == kept[1].drawn
    assert (kept[0].float_model["accuracy"].values_N == kept[1].float_model["accuracy"].values_N).all()


def test_values_are_read_as_they_were_written(tmp_path):
    values_N = np.array([0.5, np.nan, -3.0])
    strata = PerSample(np.array([1.0, 0.0, 1.0]), True, np.array([0, 1, 1]))
    of_set = PerSample(values_N, pseudo=True, design_N=np.array([0, 1, 0]))
    written = sample_values.Values({"a/b": PerSample(values_N), "c": strata, "fid": of_set}, {"c": strata}, "key")
    sample_values.save(written, tmp_path / "values.npz")
    read = sample_values.load(tmp_path / "values.npz")
    np.testing.assert_array_equal(read.run["a/b"].values_N, values_N)
    assert not read.run["a/b"].yes_no and read.run["a/b"].strata_N is None
    assert read.run["fid"].pseudo and not read.run["c"].pseudo and read.run["fid"].design_N.tolist() == [0, 1, 0]
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
    ("make", "names"),
    [
        (pictures, ["geneval_shapes/overall", "collapse", "psnr"]),
        (videos, ["motion_shapes/object", "flow_score", "psnr"]),
    ],
)
def test_a_metric_of_samples_is_held_against_the_float_model_of_the_same_noise(make, names):
    worse, model = make(2), make(0)
    metrics, found = evaluate_samples(names, Evidence(worse, model))
    of_float = evaluate_samples(names, Evidence(model, model))
    unpaired = {name: of_float[1][name] for name in names if name != "psnr"}
    stage.hold_against_float(metrics, found, unpaired)
    assert metrics["psnr"]["noise_floor"] is None and "against_float" not in metrics["psnr"]
    for name in unpaired:
        entry, held = metrics[name], metrics[name]["against_float"]
        assert held["difference"] == pytest.approx(entry["value"] - of_float[0][name]["value"])
        half = (held["ci95"][1] - held["ci95"][0]) / 2
        assert entry["noise_floor"] == pytest.approx(half) and half > 0
        assert 0 < held["p"] <= 1 and held["n"] == len(worse)


def test_other_seeds_of_the_float_model_are_recorded_and_are_the_floor_of_what_has_nothing_per_sample(monkeypatch):
    seeds = iter([{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 5.0}, {"a": 3.0, "b": None}])

    def entries(values):
        return {
            name: {"value": value, "paired": False, "status": "ok", "noise_floor": None}
            for name, value in values.items()
        }

    monkeypatch.setattr(stage, "scored", lambda *_: (entries(next(seeds)), {}))
    metrics = entries({"a": 1.5, "b": 2.5})
    metrics["b"]["noise_floor"] = 0.25
    stage.write_noise_floor(None, None, metrics, [None] * 3)
    assert metrics["a"]["float_seeds"] == [1.0, 2.0, 3.0] and metrics["b"]["float_seeds"] == [3.0, 5.0, None]
    assert metrics["a"]["noise_floor"] == pytest.approx(4.302653 * np.sqrt(2)) and metrics["b"]["noise_floor"] == 0.25


def test_where_a_metric_broke_on_the_float_model_s_samples_they_are_drawn_again_once(monkeypatch):
    """A sample that was damaged after it was drawn is drawn again by whoever asks for the store anew."""

    def entries(value, status="ok"):
        return {"a": {"value": value, "paired": False, "status": status, "noise_floor": None}}

    found = iter([entries(1.0), entries(None, "failed"), entries(1.0), entries(3.0)])
    asked = []
    drawn = SimpleNamespace(key="k")
    monkeypatch.setattr(stage, "float_samples", lambda config, model, seed, dtype: asked.append(seed) or drawn)
    monkeypatch.setattr(stage, "scored", lambda *_: (next(found), {}))
    config = SimpleNamespace(seed=0, section=lambda _: {"noise_floor_seeds": 1, "dtype": "bfloat16"})
    metrics = entries(1.5)
    assert stage.add_noise_floor(config, None, metrics) == ["k", "k"]
    assert metrics["a"]["float_seeds"] == [1.0, 3.0] and metrics["a"]["noise_floor"] > 0
    assert asked == [0, stage.SEED_STRIDE] * 2


def test_a_metric_that_cannot_run_on_every_seed_gets_no_noise_floor_of_seeds():
    assert stage.apart([1.0, None, 3.0]) is None and stage.apart([2.0, 2.0]) == 0.0
