from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import SMALL_DIT, relative_error
from ditbench.harness.models.base import Correction, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.samples.conditions import Conditions

LABELS, SEEDS = (7, 0, 999, 7), (11, 12, 13, 14)
KINDS = ("ddim", "ddpm")


def draw(model, sampler: Sampler, labels=LABELS, seeds=SEEDS, **hooks):
    with torch.no_grad():
        return model.adapter.sample(
            model.pipe,
            float_copy(model.target(), dtype=torch.float32),
            Conditions(tuple(seeds), torch.tensor(labels)),
            sampler,
            **hooks,
        )


def latents_of(*args, **kwargs):
    return draw(*args, **kwargs).latents


@pytest.mark.parametrize("guidance", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_samples_are_those_of_the_diffusers_pipeline(guidance, steps, latent_pipe, latent_model):
    """DiTPipeline.__call__ with one generator per image, decoded through the VAE."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = latent_pipe(
        list(LABELS), guidance_scale=guidance, generator=generators, num_inference_steps=steps, output_type="pt"
    ).images
    with torch.no_grad():
        images = draw(latent_model, Sampler("ddim", steps, guidance)).pixels
    assert expected.shape == images.shape == (4, 3, 16, 16)
    assert float(expected.std()) > 1e-2
    torch.testing.assert_close(images / 2 + 0.5, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind, latent_model):
    sampler = Sampler(kind, 4, 1.5)
    together = latents_of(latent_model, sampler)
    for start, stop in ((0, 1), (1, 4)):
        part = latents_of(latent_model, sampler, LABELS[start:stop], SEEDS[start:stop])
        torch.testing.assert_close(part, together[start:stop], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_follows_its_own_seed_and_label(kind, latent_model):
    sampler = Sampler(kind, 4, 1.5)
    first = latents_of(latent_model, sampler)
    assert torch.equal(latents_of(latent_model, sampler), first)
    other_seed = latents_of(latent_model, sampler, seeds=(11, 12, 99, 14))
    other_label = latents_of(latent_model, sampler, labels=(7, 1, 999, 7))
    changed = [(not torch.allclose(a, b, atol=1e-3)) for a, b in zip(first, other_seed, strict=True)]
    assert changed == [False, False, True, False]
    changed = [(not torch.allclose(a, b, atol=1e-5)) for a, b in zip(first, other_label, strict=True)]
    assert changed == [False, True, False, False]
    assert not torch.allclose(first[0], first[3], atol=1e-3)  # same label, other seed


def test_drawing_leaves_the_global_random_state_alone(latent_model):
    before = torch.get_rng_state()
    latents_of(latent_model, Sampler("ddpm", 3, 1.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_ddpm_uses_the_learned_variance(latent_model):
    """Other variance channels, other samples: the noise of the same seeds is scaled by another σ."""
    changed = replace(latent_model, pipe=copy.deepcopy(latent_model.pipe))
    before = latents_of(changed, Sampler("ddpm", 4, 1.5))
    unchanged_ddim = latents_of(changed, Sampler("ddim", 4, 1.5))
    bias = changed.transformer.proj_out_2.bias.view(2, 2, 8)  # patch, patch, channels
    bias[..., 4:] += 2.0
    assert not torch.allclose(latents_of(changed, Sampler("ddpm", 4, 1.5)), before, atol=1e-3)
    assert torch.equal(latents_of(changed, Sampler("ddim", 4, 1.5)), unchanged_ddim)


def test_a_model_without_learned_variance_runs_ddpm_too(small_model):
    samples = latents_of(small_model, Sampler("ddpm", 4, 1.5), labels=(1, 2, 3, 4))
    assert samples.shape == (4, 1, 8, 8) and bool(samples.isfinite().all())


def test_every_call_is_seen_with_its_step_and_doubled_for_guidance(small_model):
    seen = []
    latents_of(
        small_model,
        Sampler("ddim", 3, 1.5),
        (1, 2, 3, 4),
        on_call=lambda step, inputs: seen.append((step, dict(inputs))),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    timesteps = [int(inputs["timestep"][0]) for _, inputs in seen]
    assert timesteps == sorted(timesteps, reverse=True)
    for _, inputs in seen:
        assert inputs["class_labels"].tolist() == [1, 2, 3, 4, 10, 10, 10, 10]  # then the null label
        conditional, null = inputs["hidden_states"].chunk(2)
        assert torch.equal(conditional, null)
    seen.clear()
    latents_of(small_model, Sampler("ddim", 2, 1.0), (1, 2, 3, 4), on_call=lambda step, inputs: seen.append(inputs))
    assert [inputs["class_labels"].tolist() for inputs in seen] == [[1, 2, 3, 4]] * 2


def test_the_clock_says_the_step_during_each_call(small_model):
    model = float_copy(small_model.target(), dtype=torch.float32)
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(int(model.clock.step)))
    with torch.no_grad():
        conditions = Conditions((5,), torch.tensor([1]))
        small_model.adapter.sample(small_model.pipe, model, conditions, Sampler("ddim", 4, 1.5))
    assert steps == [0, 1, 2, 3]


def test_a_corrected_noise_estimate_is_the_one_that_is_used(latent_model):
    sampler, seen = Sampler("ddim", 3, 1.5), []
    plain = latents_of(latent_model, sampler)

    def correct(step, noise):
        seen.append((step, noise.shape))
        return noise if step < 2 else 0.5 * noise

    corrected = latents_of(latent_model, sampler, correct=Correction(noise=correct))
    assert seen == [(step, (4, 4, 8, 8)) for step in range(3)], "the guided estimate, without variance channels"
    assert not torch.allclose(corrected, plain, atol=1e-3)
    torch.testing.assert_close(
        latents_of(latent_model, sampler, correct=Correction(noise=lambda step, noise: noise)), plain
    )


def test_a_corrected_variance_is_the_one_that_ddpm_adds(latent_model):
    seen = []

    def correct(step, variance, weight):
        seen.append(step)
        return 0 * variance

    sampler = Sampler("ddpm", 3, 1.5)
    still, plain = (
        latents_of(latent_model, sampler, correct=Correction(variance=correct)),
        latents_of(latent_model, sampler),
    )
    assert seen == [0, 1], "the last step adds nothing"
    assert not torch.allclose(still, plain, atol=1e-3)


def test_fewer_than_one_step_is_refused():
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        Sampler("ddim", 0, 1.5)


def test_pixels_without_a_vae_are_grey_images_in_range(small_model):
    latents = 3 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = small_model.adapter.pixels(small_model.pipe, latents)
    assert images.shape == (2, 3, 8, 8) and torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(images[:, :1], latents.clamp(-1, 1))


def test_the_producers_named_by_the_sites_make_the_inputs_of_their_consumers(small_model):
    """From recorded tensors: LN(x)(1 + γ) + β with the named rows; the attention output from the V rows."""
    model = float_copy(small_model.target(), dtype=torch.float64)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in small_model.step_inputs(2).items()}
    entered, left = {}, {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: entered.update({name: args[0]}) if args else None)
        module.register_forward_hook(lambda _, args, output, name=name: left.update({name: output}))
    with torch.no_grad():
        model(**inputs)
    sites = small_model.adapter.sites(small_model.transformer)
    assert len(sites) == 8
    for site in sites:
        assert all(torch.equal(entered[site.consumers[0]], entered[name]) for name in site.consumers), (
            "one shared input"
        )
        block = site.name.rsplit(".", 1)[0]
        if site.modulated:
            norm = "norm1.norm" if site.name.endswith("attn_in") else "norm3"
            rows = left[site.producers[0].linear][:, None]
            expected = (
                left[f"{block}.{norm}"] * (1 + rows[..., site.producers[0].scale_rows])
                + rows[..., site.producers[0].shift_rows]
            )
        elif site.foldable:
            q, k, v = (left[f"{block}.attn1.to_{o}"].unflatten(-1, (2, 24)).transpose(1, 2) for o in "qkv")
            assert site.producers[0].linear == f"{block}.attn1.to_v"
            expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            assert site.name.endswith("ff_mid")
            continue
        torch.testing.assert_close(entered[site.consumers[0]], expected, rtol=1e-10, atol=1e-10)


def test_the_default_protocol_quantizes_the_linears_of_the_blocks_without_adaln(small_model):
    inside = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    blocks = [f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in inside]
    assert list(small_model.target().layers) == blocks
    everything = small_model.target("all").layers
    linears = [
        n for n, m in small_model.transformer.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    assert list(everything) == linears and len(linears) > len(blocks)
    assert list(small_model.target(skip=[r"to_[qk]$"]).layers) == [
        n for n in blocks if not n.endswith(("to_q", "to_k"))
    ]


def test_every_target_layer_reads_from_exactly_one_site(small_model):
    for scope in ("blocks", "all"):
        target = small_model.target(scope)
        for name in target.layers:
            assert sum(name in site.consumers for site in target.sites) == 1
        assert target.site_of(target.layers[0]).name == "transformer_blocks.0.attn_in" or scope == "all"


@pytest.mark.parametrize(
    ("scope", "skip", "message"), [("everything", (), "expected blocks or all"), ("blocks", [""], "leave no layer")]
)
def test_a_protocol_without_layers_is_refused(scope, skip, message, small_model):
    with pytest.raises(UserError, match=message):
        small_model.target(scope, skip)


def activations(model) -> torch.Tensor:
    """The input of the first q, k, v, (tokens, C)."""
    copy_, seen = float_copy(model.target(), dtype=torch.float32), []
    copy_.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        copy_(**model.step_inputs(8))
    return seen[0]


@pytest.mark.parametrize("log2_factor", [3, 5])
def test_stress_keeps_the_output_and_gives_the_activations_outlier_channels(log2_factor, small_model, own_model):
    own_model.inject_outliers(channels=3, log2_factor=log2_factor, seed=0)
    inputs = small_model.step_inputs(8)
    with torch.no_grad():
        expected, output = (m.transformer(**inputs).sample for m in (small_model, own_model))
    assert relative_error(output, expected) < 1e-5
    plain, stressed = activations(small_model), activations(own_model)
    ratio = stressed.abs().amax(0) / plain.abs().amax(0)
    grown = ratio > 1.5
    assert int(grown.sum()) == 3
    exponents = ratio[grown].log2()
    torch.testing.assert_close(exponents, exponents.round(), rtol=0, atol=1e-3)
    assert log2_factor - 2 - 1e-3 <= float(exponents.min()) <= float(exponents.max()) <= log2_factor + 1e-3

    def kurtosis(x: torch.Tensor) -> float:
        centred = x - x.mean()
        return float(centred.pow(4).mean() / centred.square().mean() ** 2)

    assert kurtosis(stressed) > 2 * kurtosis(plain)
    spread = [float(x.abs().max() / x.abs().median()) for x in (stressed, plain)]
    assert spread[0] > 2 * spread[1]


def test_stress_reaches_every_site_that_has_a_producer(small_model, own_model):
    """Three columns of each consumer are divided; nothing that reads GELU's output is touched."""
    own_model.inject_outliers(channels=3, log2_factor=5, seed=0)
    for site in small_model.adapter.sites(small_model.transformer):
        for name in site.consumers:
            after, before = (model.transformer.get_submodule(name).weight for model in (own_model, small_model))
            of_column = (after / before).median(dim=0).values  # the rows of V are scaled too, most of them by 1
            assert int((of_column < 0.9).sum()) == (3 if site.foldable else 0), name


def test_stress_by_its_seed_is_part_of_the_models_fingerprint():
    stress = {"channels": 3, "log2_factor": 4}
    specs = [
        ModelSpec("small", "dit", random=SMALL_DIT, stress=each)
        for each in (None, {**stress, "seed": 0}, {**stress, "seed": 0}, {**stress, "seed": 1})
    ]
    plain, one, same, other = (load_model(spec).fingerprint for spec in specs)
    assert one == same and len({plain, one, other}) == 3
