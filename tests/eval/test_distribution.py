import gc
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.stats import t

from ditbench.eval import batches, features, frechet, libraries
from ditbench.eval.base import Reference, evaluate, evaluate_samples, known_metrics
from ditbench.eval.features import judge_pair, outputs
from ditbench.eval.influence import spread, spread_within
from ditbench.eval.set_scores import recall_spread
from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.samples import Samples

JUDGE_METRICS = [
    "clean_fid/fid_judge", "clean_fid/kid_judge", "torch_fidelity/fid_judge", "torch_fidelity/is_judge",
    "torch_fidelity/kid_judge", "torch_fidelity/precision_judge", "torch_fidelity/recall_judge",
    "torchmetrics/fid_judge", "torchmetrics/is_judge", "torchmetrics/kid_judge",
]  # fmt: skip
PASSPORT = {"implementation", "version", "reference", "weights_sha256", "resize", "antialias", "dtype"}


def gaussian_with_exact_moments(n, mean_F, cov_FF, seed):
    """Rows whose sample mean and covariance (n − 1) are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(n, len(mean_F)))
    rows -= rows.mean(axis=0)
    rows = rows @ linalg.inv(linalg.sqrtm(np.cov(rows, rowvar=False))) @ linalg.sqrtm(cov_FF).real + mean_F
    return torch.from_numpy(rows)


@pytest.mark.parametrize("library", libraries.FID)
def test_fid_of_gaussians_is_the_closed_form(library):
    """For diagonal covariances |μ₁ − μ₂|² + Σ (σ₁ − σ₂)²."""
    mean_1, mean_2 = np.array([1.0, 0.0, 2.0]), np.array([0.0, 0.5, 2.0])
    sigma_1, sigma_2 = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    generated = gaussian_with_exact_moments(40, mean_1, np.diag(sigma_1**2), 0)
    reference = gaussian_with_exact_moments(70, mean_2, np.diag(sigma_2**2), 1)
    value, _ = libraries.FID[library](generated, reference, 0)
    assert value == pytest.approx(1.25 + 1 + 0 + 6.25, rel=1e-6)


@pytest.mark.parametrize("library", libraries.KID)
def test_kid_is_the_mean_of_a_plain_mmd_loop_when_a_subset_is_the_whole_set(library):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 5)), random.normal(size=(12, 5)) * 1.5 + 0.7

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    total = 0.0
    for i in range(12):
        for j in range(12):
            total -= 2 * kernel(x[i], y[j]) / 144
            if i != j:
                total += (kernel(x[i], x[j]) + kernel(y[i], y[j])) / (12 * 11)
    value, settings = libraries.KID[library](torch.from_numpy(x), torch.from_numpy(y), 0)
    assert value == pytest.approx(total, rel=1e-9)
    assert settings["subset_size"] == 12


@pytest.mark.parametrize("library", libraries.IS)
def test_inception_score_is_exp_of_the_mean_kl_divergence(library):
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 7)) * 2)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    value, settings = libraries.IS[library](logits, 0)
    assert settings["splits"] == 1 and value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("library", libraries.IS)
def test_inception_score_of_a_judge_that_is_sure_is_the_number_of_classes_and_not_nan(library):
    logits = torch.full((40, 10), -150.0)
    logits[torch.arange(40), torch.arange(40) % 4] = 150.0
    value, _ = libraries.IS[library](logits, 0)
    assert value == pytest.approx(4.0)


def test_inception_score_uses_ten_splits_once_there_are_500_images_in_each():
    assert libraries.is_splits(4999) == 1 and libraries.is_splits(5000) == 10


def test_precision_is_about_the_generated_and_recall_about_the_reference():
    """Generated: one tight cluster inside one of two reference clusters. All of it is near, half of them are not."""
    line = torch.arange(10.0)[:, None] * torch.tensor([[1.0, 0.0]])
    reference = torch.cat([line, line + 1000.0])
    generated = line[1:9] + 0.01
    precision, recall, settings = libraries.torch_fidelity_prc(generated, reference)
    assert (precision, recall) == (1.0, 0.5)
    assert settings["neighbours"] == 3


def test_three_libraries_agree_on_fid_in_the_judges_features(evidence):
    names = ["torchmetrics/fid_judge", "torch_fidelity/fid_judge", "clean_fid/fid_judge"]
    values = [evaluate([name], evidence)[name]["value"] for name in names]
    assert values[0] > 1e-3
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)


def test_clean_fid_runs_with_a_scipy_whose_square_root_takes_a_matrix_and_nothing_else(evidence, monkeypatch):
    """scipy 1.18's: without the `disp` that clean-fid 0.1.35 passes."""
    name, root = "clean_fid/fid_judge", linalg.sqrtm
    before = evaluate([name], evidence)[name]["value"]
    monkeypatch.setattr(linalg, "sqrtm", lambda matrix: root(matrix))
    assert evaluate([name], evidence)[name]["value"] == before


def test_three_libraries_agree_on_kid_within_its_interval(evidence):
    names = ["torchmetrics/kid_judge", "torch_fidelity/kid_judge", "clean_fid/kid_judge"]
    entries = evaluate(names, evidence)
    assert entries[names[0]]["value"] > 0
    for one in entries.values():
        for other in entries.values():
            assert one["ci95"][0] <= other["value"] <= one["ci95"][1]


@pytest.mark.parametrize("name", JUDGE_METRICS)
def test_every_judge_metric_has_a_finite_value_an_interval_around_it_and_a_full_passport(name, evidence):
    entry = evaluate([name], evidence)[name]
    assert entry["status"] == "ok" and np.isfinite(entry["value"]) and entry["n"] == 96
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert entry["ci95"][0] < entry["ci95"][1]
    passport = entry["passport"]
    assert passport.keys() >= PASSPORT | {"ci_method"}
    assert passport["weights_sha256"] == "0" * 64 and passport["features"] == "judge random"
    assert passport["reference"] == (None if "/is_" in name else "bright")


@pytest.mark.parametrize("library", libraries.FID)
def test_fid_of_the_references_own_images_is_zero_within_a_finite_interval(library, evidence):
    """A hair above 0, it had a logarithm whose interval reached to infinity, and the metric failed."""
    name, own = f"{library}/fid_judge", evidence.generated.images_NHWC
    same = Reference("the same", own, hashlib.sha256(own.numpy().tobytes()).hexdigest())
    entry = evaluate([name], replace(evidence, reference=same))[name]
    low, high = entry["ci95"]
    assert entry["status"] == "ok" and abs(entry["value"]) < 1e-4
    assert low <= entry["value"] <= high < 1.0 and "logarithm" not in entry["passport"]["ci_method"]


TO_FLOAT = [f"{library}/fid_judge_to_float" for library in libraries.FID]


def test_fd_infinity_has_an_interval_of_its_samples_and_of_its_choice_of_halves(evidence):
    pair, strata_N = judge_pair(evidence), np.arange(96) % 10
    features = pair.generated_NF.numpy(), pair.reference_MF.numpy()
    found = frechet.infinity(*features, frechet.influence(*features), strata_N, evidence.seed)
    of_samples = spread(found.influence, strata_N)
    half = t.ppf(0.975, of_samples.freedom) * np.sqrt(of_samples.sd**2 + found.split_sd**2)
    entry = evaluate(["fd_infinity_judge"], evidence)["fd_infinity_judge"]
    assert entry["value"] == pytest.approx(found.value) and found.split_sd > 0.01 * of_samples.sd
    assert entry["ci95"] == pytest.approx([found.value - half, found.value + half], rel=1e-6)
    assert "n = 96 is below four times the feature width 64" in entry["passport"]["note"]


@pytest.mark.parametrize("name", TO_FLOAT)
def test_fid_to_float_is_fid_with_the_float_models_images_for_the_reference(name, evidence):
    float_images = Reference("float", evidence.float_model.images_NHWC, "f" * 64)
    entry = evaluate([name], evidence)[name]
    same = name.removesuffix("_to_float")
    expected = evaluate([same], replace(evidence, reference=float_images))[same]
    assert entry["value"] == expected["value"] and "pairs" in entry["passport"]["ci_method"]
    wide, narrow = (e["ci95"][1] - e["value"] for e in (expected, entry))
    assert 0 < narrow < wide  # what the two images of a pair share does not widen it
    assert entry["value"] != pytest.approx(evaluate([same], evidence)[same]["value"], rel=0.1)
    assert entry["paired"] and entry["passport"]["reference"] == "float model, same noise and labels"
    pixels = evidence.float_model.pixels.numpy().tobytes()
    assert entry["passport"]["reference_sha256"] == hashlib.sha256(pixels).hexdigest()


@pytest.mark.parametrize("name", TO_FLOAT)
def test_no_distance_to_the_float_model_lies_below_zero(name, evidence):
    """One image of 96 has changed: what it contributes is known with one degree of freedom, and Student's t of that is 12.7."""
    pixels = evidence.float_model.pixels.clone()
    pixels[5] = 255 - pixels[5]
    entry = evaluate([name], replace(evidence, generated=replace(evidence.generated, pixels=pixels)))[name]
    assert entry["ci95"][0] == 0.0 < entry["value"] < entry["ci95"][1]


@pytest.mark.parametrize("name", TO_FLOAT)
def test_fid_to_float_needs_no_reference_but_the_float_model(name, evidence):
    assert evaluate([name], replace(evidence, reference=None))[name]["status"] == "ok"
    entry = evaluate([name], replace(evidence, float_model=None))[name]
    assert entry["status"] == "skipped" and "float model" in entry["reason"]


def test_the_names_are_those_promised_and_the_judges_numbers_never_bear_inceptions_names():
    names = {name for name in known_metrics() if "/" in name and name.endswith("_judge")}
    assert names == set(JUDGE_METRICS)
    assert {name.removesuffix("_judge") for name in names} <= set(known_metrics())


@pytest.mark.parametrize("name", JUDGE_METRICS)
def test_the_same_seed_gives_the_same_entry_and_no_global_random_state_moves(name, judge, evidence_of):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again = (evaluate([name], evidence_of())[name] for _ in range(2))
    assert first == again
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_subsets_shrink_with_the_set_and_the_passport_says_so(evidence_of):
    entries = evaluate(JUDGE_METRICS, evidence_of(n=5, reference_n=9))
    assert {entry["status"] for entry in entries.values()} <= {"ok", "skipped"}
    for library in libraries.KID:
        assert entries[f"{library}/kid_judge"]["passport"]["subset_size"] == 5
    assert entries["torch_fidelity/fid_judge"]["passport"]["note"].startswith("n = 5 is not above the feature width 64")


def test_a_reference_of_few_images_is_said_in_the_passport_and_whose_moments_were_taken(evidence_of):
    few, enough = (
        evaluate(["torch_fidelity/fid_judge"], evidence_of(n=80, reference_n=m))["torch_fidelity/fid_judge"]["passport"]
        for m in (60, 80)
    )
    assert few["note"].startswith("the reference's 60 are not above the feature width 64") and "note" not in enough
    assert enough["reference_moments"] == "of the reference batch's 80 images"


@pytest.mark.parametrize("name", JUDGE_METRICS)
def test_one_image_is_too_few_and_the_reason_says_how_many_are_needed(name, evidence_of):
    entry = evaluate([name], evidence_of(n=1))[name]
    assert entry["status"] == "skipped" and "got 1" in entry["reason"] and entry["value"] is None


def test_without_a_reference_only_metrics_that_compare_are_skipped(evidence):
    entries = evaluate(JUDGE_METRICS, replace(evidence, reference=None))
    ran = {name for name, entry in entries.items() if entry["status"] == "ok"}
    assert ran == {"torchmetrics/is_judge", "torch_fidelity/is_judge"}
    assert "no reference" in entries["clean_fid/fid_judge"]["reason"]


def test_without_a_judge_every_judge_metric_is_skipped(evidence):
    entries = evaluate([*JUDGE_METRICS, "accuracy"], replace(evidence, judge=None))
    assert {entry["status"] for entry in entries.values()} == {"skipped"}


def test_accuracy_counts_the_labels_the_judge_recognises(evidence):
    seen = outputs(evidence.generated.images_NHWC, evidence.judge.module, "logits").argmax(dim=1)
    labels = seen.clone()
    labels[:24] = (labels[:24] + 1) % 10
    entry = evaluate(["accuracy"], replace(evidence, generated=replace(evidence.generated, labels_N=labels)))[
        "accuracy"
    ]
    assert entry["value"] == pytest.approx(72 / 96) and entry["passport"]["design"] == "independent"
    unlabelled = replace(evidence, generated=Samples(evidence.generated.images_NHWC))
    assert "labels" in evaluate(["accuracy"], unlabelled)["accuracy"]["reason"]


@pytest.mark.parametrize("name", ["features", "logits"])
def test_outputs_are_the_judges_own_on_images_with_channels_first(name, evidence, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 40)  # 40 + 40 + 16
    images, module = evidence.generated.images_NHWC, evidence.judge.module
    compute = module.features if name == "features" else module
    with torch.no_grad():
        theirs = compute(torch.from_numpy(np.moveaxis(images.numpy(), 3, 1)))
    torch.testing.assert_close(outputs(images, module, name), theirs)


def test_features_are_computed_once_per_image_set_and_again_when_the_images_change(evidence, monkeypatch):
    calls = []
    original = type(evidence.judge.module).features
    monkeypatch.setattr(
        type(evidence.judge.module), "features", lambda self, x: calls.append(len(x)) or original(self, x)
    )
    evaluate(["torchmetrics/fid_judge", "clean_fid/fid_judge", "torch_fidelity/recall_judge"], evidence)
    assert calls == [96, 300]
    evidence.reference.images_NHWC[0] = 0
    judge_pair(replace(evidence, seed=1))
    assert calls == [96, 300, 300]


def test_small_products_run_on_one_thread_and_the_number_of_threads_comes_back(evidence, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    original = libraries.FID["torch_fidelity"]
    monkeypatch.setitem(
        libraries.FID, "torch_fidelity", lambda *given: seen.append(torch.get_num_threads()) or original(*given)
    )
    torch.set_num_threads(2)
    try:
        evaluate(["torch_fidelity/fid_judge"], evidence)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_features_are_forgotten_with_the_images_and_the_evidence(evidence_of):
    gc.collect()
    before = len(batches._outputs), len(features._pairs)
    evidence = evidence_of()
    evaluate(["clean_fid/fid_judge"], evidence)
    assert (len(batches._outputs), len(features._pairs)) == (before[0] + 3, before[1] + 1), "two sets and latents"
    del evidence
    gc.collect()
    assert (len(batches._outputs), len(features._pairs)) == before


def test_images_made_in_inference_mode_can_be_scored(evidence):
    with torch.inference_mode():
        images = evidence.generated.images_NHWC.clone()
    made = replace(evidence, generated=Samples(images))
    assert evaluate(["clean_fid/fid_judge"], made)["clean_fid/fid_judge"]["status"] == "ok"


def test_a_judge_left_in_training_mode_is_read_in_eval_mode_and_left_as_it_was(evidence):
    module = evidence.judge.module
    expected = outputs(evidence.generated.images_NHWC, module, "features")
    module.train()
    try:
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        torch.testing.assert_close(outputs(evidence.generated.images_NHWC.clone(), module, "features"), expected)
        assert module.training
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    finally:
        module.eval()


def test_an_unknown_metric_is_answered_with_the_nearest_name(evidence):
    with pytest.raises(UserError, match="did you mean 'torchmetrics/fid_judge'"):
        evaluate(["torchmetric/fid_judge"], evidence)


def test_runs_are_told_apart_by_recall_as_well_as_its_own_interval_knows_it(evidence):
    """The spread of what each sample contributes is that of the interval, not that of leaving out one at a time."""
    entries, samples = evaluate_samples(["torch_fidelity/recall_judge"], evidence)
    pair, strata_N = judge_pair(evidence), evidence.design.strata_N
    expected = recall_spread(pair.generated_NF, pair.reference_MF, 3, strata_N, evidence.seed).sd
    kept_N = samples["torch_fidelity/recall_judge"].values_N
    assert kept_N.mean() == pytest.approx(entries["torch_fidelity/recall_judge"]["value"])
    assert spread_within(kept_N, strata_N).sd == pytest.approx(expected) and expected > 0
