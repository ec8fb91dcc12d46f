from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import linregress
from small_pipelines import SIZES, SMALL

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import calibrate, selected
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.conformance import relative_error as error_of
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import Correction, LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.families.dit import CorrectedDDPM
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.samples.samples import Prompt
from ditbench.methods import ptqd, rtn
from ditbench.methods.ptqd import Params, correct_step, correct_variance, error_statistics, noise_estimates

BITS = DYNAMIC.with_widths(3, 4)
JOINT = Params(correction="joint")


def state_of(slope, bias_c, residual_std=0.0) -> dict[str, torch.Tensor]:
    """Two steps, of which the second is asked for."""
    rows = lambda value: torch.stack([torch.zeros_like(value) + 7, value])  # noqa: E731
    values = {"slope_S": slope, "bias_Sc": bias_c, "residual_std_S": torch.as_tensor(residual_std)}
    return {name: rows(torch.as_tensor(value, dtype=torch.float64)) for name, value in values.items()}


def estimates(normal, residual: float = 0.0, slope: float = 0.13):
    """ε with a mean of its own in every channel, and ε̂ = (1 + k) ε + bias + residual."""
    exact = normal(6, 4, 5, 5) + torch.tensor([3.0, -2.0, 0.0, 1.0]).double()[:, None, None]
    bias_c = torch.tensor([0.5, -0.2, 0.1, -1.0]).double()
    noisy = (1 + slope) * exact + bias_c[:, None, None] + residual * normal(6, 4, 5, 5, seed=1)
    return exact, noisy, bias_c


@pytest.mark.parametrize("slope", [0.13, -0.2, 0.0])
def test_without_residual_the_correction_recovers_the_noise_exactly(slope, normal):
    exact, noisy, bias_c = estimates(normal, slope=slope)
    k, bias, residual_std = error_statistics(exact, noisy, JOINT)
    assert float(k) == pytest.approx(slope, abs=1e-12) and float(residual_std) < 1e-12
    torch.testing.assert_close(bias, bias_c, rtol=1e-12, atol=1e-12)
    corrected = correct_step(state_of(k, bias), JOINT, 1, noisy)
    torch.testing.assert_close(corrected, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_a_guided_estimate_is_recovered_with_the_statistics_of_its_rows(guidance, normal):
    """w and 1 − w sum to one: a slope and a bias that both rows share pass through guidance."""
    exact, noisy, _ = estimates(normal)
    state = state_of(*error_statistics(exact, noisy, JOINT))

    def guided(estimate):
        conditional, null = estimate.chunk(2)
        return null + guidance * (conditional - null)

    corrected = correct_step(state, JOINT, 1, guided(noisy))
    torch.testing.assert_close(corrected, guided(exact), rtol=1e-12, atol=1e-12)


def statistics_by_hand(exact, noisy) -> tuple[float, list[float], float]:
    """Least squares of Δ = k ε + bias_c by its normal equations, (k, bias_1 … bias_c) at once, in plain loops."""
    channels = exact.shape[1]
    matrix, right = torch.zeros(channels + 1, channels + 1).double(), torch.zeros(channels + 1).double()
    points = []
    for sample, ours in zip(exact.tolist(), noisy.tolist(), strict=True):
        for c in range(channels):
            for row, other in zip(sample[c], ours[c], strict=True):
                points += [(c, e, q - e) for e, q in zip(row, other, strict=True)]
    for c, e, delta in points:
        matrix[0, 0] += e * e
        matrix[0, c + 1] += e
        matrix[c + 1, 0] += e
        matrix[c + 1, c + 1] += 1
        right[0] += e * delta
        right[c + 1] += delta
    k, *bias = torch.linalg.solve(matrix, right).tolist()
    left = [delta - k * e - bias[c] for c, e, delta in points]
    mean = sum(left) / len(left)
    return k, bias, (sum((v - mean) ** 2 for v in left) / (len(left) - 1)) ** 0.5


def test_the_statistics_are_the_least_squares_of_the_paper(normal):
    exact, noisy, _ = estimates(normal, residual=0.3)
    k, bias, residual_std = statistics_by_hand(exact, noisy)
    found = error_statistics(exact, noisy, JOINT)
    assert float(found[0]) == pytest.approx(k, rel=1e-10) and float(found[2]) == pytest.approx(residual_std, rel=1e-10)
    assert found[1].tolist() == pytest.approx(bias, rel=1e-10)


@pytest.mark.parametrize("slope", [0.13, -0.2])
def test_the_releases_statistics_are_those_of_its_scripts(slope, normal):
    """One intercept, a slope below 0 counts as 0, the bias is that of the raw error, σ_q the mean over samples."""
    exact, noisy, _ = estimates(normal, residual=0.3, slope=slope)
    k, bias_c, residual_std = error_statistics(exact, noisy, Params())
    error = noisy - exact
    expected = max(linregress(exact.flatten().numpy(), error.flatten().numpy()).slope, 0.0)
    assert float(k) == pytest.approx(expected, rel=1e-10) and (expected > 0) == (slope > 0)
    assert bias_c.tolist() == pytest.approx([float(error[:, c].mean()) for c in range(4)], rel=1e-10)
    stds = [float(torch.std(error[i] - expected * exact[i])) for i in range(6)]
    assert float(residual_std) == pytest.approx(sum(stds) / 6, rel=1e-10)


def test_the_published_form_learns_its_rounding_with_one_range_per_tensor(small_target, small_calibration):
    form = ptqd.FORMS["published"]
    params = Params(**{**form.params, "iterations": 3, "scale_iterations": 2})
    bits = Bits(QuantSpec(4, "per_tensor", symmetric=False), STATIC.act)
    state = ptqd.fit(small_target, small_calibration, bits, params)
    recipe = ptqd.apply(small_target, state, bits, params)
    weight = recipe.layers["transformer_blocks.0.attn1.to_q"].weight
    assert len(set(weight.scale_OG.flatten().tolist())) == 1
    assert torch.equal(weight.codes_OC, state["transformer_blocks.0.attn1.to_q/codes"])


def test_the_statistics_of_a_fit_are_those_of_each_step(small_target, small_calibration):
    """From the two models' outputs, step by step."""
    state = ptqd.fit(small_target, small_calibration, BITS, JOINT)
    recipe = rtn.apply(small_target, rtn.fit(small_target, small_calibration, BITS, rtn.Params()), BITS, rtn.Params())
    quantized = build(small_target, recipe, dtype=torch.float32)
    assert state["slope_S"].shape == (4,) and state["bias_Sc"].shape == (4, 1)
    for step, inputs in enumerate(small_calibration.per_step):
        with torch.no_grad():
            exact, noisy = (model(**inputs).sample.double() for model in (small_target.transformer, quantized))
        k, bias, residual_std = statistics_by_hand(exact, noisy)
        assert float(state["slope_S"][step]) == pytest.approx(k, rel=1e-3, abs=1e-5)
        assert state["bias_Sc"][step].tolist() == pytest.approx(bias, rel=1e-3, abs=1e-5)
        assert float(state["residual_std_S"][step]) == pytest.approx(residual_std, rel=1e-3)
    assert len(set(state["slope_S"].tolist())) == 4


def test_a_learned_variance_is_left_out_and_rows_are_taken_in_any_batches(small_calibration):
    class Doubled(torch.nn.Module):
        def forward(self, hidden_states, **unused):
            return type("Output", (), {"sample": torch.cat([hidden_states, 9 + hidden_states], 1)})

    model = Doubled()
    model.clock = StepClock(None)
    for batch_size in (64, 4, 1):
        noise = noise_estimates(model, small_calibration, 2, 1, batch_size)
        assert torch.equal(noise, small_calibration.per_step[2]["hidden_states"].double())
    assert int(model.clock.step) == 2


def test_the_correction_brings_estimates_closer_to_the_float_models(small_target, small_calibration):
    """On the calibration's own rows, at every step."""
    state = ptqd.fit(small_target, small_calibration, BITS, Params())
    exact_model = float_copy(small_target, dtype=torch.float32)
    quantized = build(small_target, ptqd.apply(small_target, state, BITS, Params()), dtype=torch.float32)
    for step in range(4):
        exact, noisy = (noise_estimates(m, small_calibration, step, 1) for m in (exact_model, quantized))
        assert error_of(correct_step(state, Params(), step, noisy), exact) < error_of(noisy, exact)


def test_slope_and_bias_switch_off_one_by_one(normal):
    exact, noisy, bias_c = estimates(normal)
    k, bias, _ = error_statistics(exact, noisy, Params(correction="joint", slope=False))
    assert float(k) == 0 and torch.allclose(bias, (noisy - exact).mean((0, 2, 3)))
    k, bias, _ = error_statistics(exact, noisy, Params(correction="joint", bias=False))
    assert float(k) == pytest.approx(0.13) and bias.tolist() == [0.0] * 4
    k, bias, _ = error_statistics(exact, noisy, Params(correction="joint", slope=False, bias=False))
    assert torch.equal(correct_step(state_of(k, bias), JOINT, 1, noisy), noisy)


def test_an_estimate_that_has_nothing_to_do_with_the_noise_is_not_blown_up(normal):
    exact, noisy = normal(6, 4, 5, 5), 0.01 * normal(6, 4, 5, 5, seed=5)
    k, *_ = error_statistics(exact, noisy, Params(correction="joint", least_gain=0.25))
    assert float(k) == -0.75
    k, bias, _ = error_statistics(torch.zeros(2, 4, 3, 3).double(), noisy[:2, :, :3, :3], JOINT)
    assert float(k) == 0 and bool(bias.isfinite().all())


def test_a_float_model_has_nothing_to_correct(small_target, small_calibration):
    state = ptqd.fit(small_target, small_calibration, Bits(None, None), Params())
    assert float(state["slope_S"].abs().max()) < 1e-5 and float(state["bias_Sc"].abs().max()) < 1e-5


def test_the_order_of_calibration_rows_does_not_matter(small_target, small_calibration):
    backwards = torch.arange(small_calibration.num_rows(0)).flip(0)
    turned = selected(small_calibration, [backwards] * small_calibration.num_steps, "turned")
    one, other = (ptqd.fit(small_target, c, BITS, Params()) for c in (small_calibration, turned))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_the_sampler_is_given_the_corrected_estimate(small_model, small_target, small_sampler, small_calibration):
    """Through the hook that a run uses; in the dtype of the estimate, batch size aside."""
    state = ptqd.fit(small_target, small_calibration, BITS, Params())
    quantized = build(small_target, ptqd.apply(small_target, state, BITS, Params()), dtype=torch.float32)
    wanted, seen = conditions(small_model, 2, 0), []

    def correct(step, noise):
        corrected = correct_step(state, Params(), step, noise)
        seen.append((step, noise.dtype, corrected.dtype, noise.shape == corrected.shape))
        return corrected

    plain = generate(small_model, quantized, wanted, small_sampler, batch_size=2)
    ours = generate(small_model, quantized, wanted, small_sampler, batch_size=2, correct=Correction(noise=correct))
    assert seen == [(step, torch.float32, torch.float32, True) for step in range(4)]
    assert not torch.allclose(plain.latents, ours.latents, rtol=1e-3)


@pytest.mark.parametrize("gain", [0.0, 1.5])
def test_a_least_gain_out_of_range_is_refused(gain):
    with pytest.raises(ValueError, match="least_gain must be above 0 and at most 1"):
        Params(least_gain=gain)


def test_the_residuals_variance_is_taken_off_what_the_sampler_adds():
    state = {"slope_S": torch.tensor([0.0, 0.25]), "residual_std_S": torch.tensor([0.3, 0.5])}
    variance, weight = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    found = [float(correct_variance(state, params, 1, variance, weight)) for params in (Params(), JOINT)]
    assert found == pytest.approx([0.5 - (1.2 * 0.5) ** 2, 0.5 - (1.2 * 0.5 / 1.25) ** 2], rel=1e-6)
    assert float(correct_variance(state, Params(), 1, torch.tensor(0.01), weight)) == 0.0
    assert float(correct_variance(state, Params(variance=False), 1, variance, weight)) == 0.5


@pytest.mark.parametrize("learned", [False, True])
def test_the_weight_of_the_estimate_is_the_papers_where_the_variance_is_the_posteriors(learned):
    """√(1 − ᾱ' − σ²) − √(ᾱ' (1 − ᾱ) / ᾱ), the form that PTQD gives for DDIM with noise σ."""
    kind = "learned_range" if learned else "fixed_small"
    scheduler = CorrectedDDPM(num_train_timesteps=1000, variance_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    posterior = DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_small")
    posterior.set_timesteps(10)
    for t in scheduler.timesteps[:-1].tolist():
        now, before = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t - 100].double()
        sigma_2 = posterior._get_variance(t).double()
        paper = (1 - before - sigma_2).sqrt() - (before * (1 - now) / now).sqrt()
        assert float(scheduler.estimate_weight(t)) == pytest.approx(-float(paper), rel=1e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_a_scheduler_adds_the_corrected_variance(learned, normal):
    kind = "learned_range" if learned else "fixed_small"
    x, noise = normal(2, 1, 4, 4).float(), normal(2, 1, 4, 4, seed=1).float()
    estimate = torch.cat([noise, torch.zeros_like(noise)], 1) if learned else noise
    steps = []
    for correct in (None, lambda variance, weight: variance / 4, lambda variance, weight: 0 * variance):
        scheduler = CorrectedDDPM(num_train_timesteps=1000, variance_type=kind, clip_sample=False)
        scheduler.set_timesteps(10)
        scheduler.correct = correct
        t = int(scheduler.timesteps[2])
        steps.append(scheduler.step(estimate, t, x, generator=torch.Generator().manual_seed(3)).prev_sample)
    full, quarter, none = steps
    torch.testing.assert_close(quarter - none, (full - none) / 2, rtol=1e-4, atol=1e-5)
    assert float((full - none).abs().mean()) > 1e-3


def saved_family(name: str, folder) -> LoadedModel:
    torch.manual_seed(0)
    SMALL[name]().save_pretrained(folder)
    return load_model(ModelSpec(name, name, source=str(folder), size=SIZES.get(name)))


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_the_sampler_of_a_text_to_image_model_is_corrected(tmp_path, sampler):
    """Latents after the first step change by the bias alone; with DDPM what is added is corrected as well."""
    model, prompts = saved_family("pixart", tmp_path), (Prompt("a red circle"), Prompt("a blue square"))
    steps, target = Sampler(sampler, 4, 2.0), model.target()
    state = ptqd.fit(target, calibrate(model, steps, n=2, seed=0, prompts=prompts), BITS, Params())
    assert state["bias_Sc"].shape == (4, 4) and bool((state["residual_std_S"] > 0).all())
    quantized = build(target, ptqd.apply(target, state, BITS, Params()), dtype=torch.float32)

    def latents(correct):
        wanted = conditions(model, 2, 0, prompts=prompts)
        return generate(model, quantized, wanted, steps, batch_size=2, correct=correct).latents

    plain = latents(None)
    parts = [registry.correction("ptqd", state, Params()), registry.correction("ptqd", state, Params(variance=False))]
    both, noise_only = (latents(correct) for correct in parts)
    assert error_of(noise_only, plain) > 1e-3
    assert (error_of(both, noise_only) > 1e-3) == (sampler == "ddpm")
    torch.testing.assert_close(latents(None), plain, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["cogvideox", "flux"])
def test_latents_that_are_no_images_are_refused(tmp_path, family):
    model = saved_family(family, tmp_path)
    calibration = calibrate(model, Sampler("pipeline", 2, 2.0), n=1, seed=0, prompts=(Prompt("a red circle"),))
    with pytest.raises(UserError, match="ptqd is defined for image latents"):
        ptqd.fit(model.target(), calibration, BITS, Params())
