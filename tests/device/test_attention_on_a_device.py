"""Quantized attention on a device that is not the CPU: every tensor it makes lies there, and its numbers are the CPU's."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.sage import FORMS, PER_BLOCK, SageRecipe, sage_attention
from ditbench.harness.quant.spec import bits_of


@pytest.mark.parametrize("recipe", [*FORMS.values(), SageRecipe("int", None, PER_BLOCK)], ids=[*FORMS, "per_block"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_form_gives_the_cpus_numbers(recipe, mask, second, normal):
    q, k, v = (
        normal(2, heads, tokens, 24, seed=seed).float()
        for seed, (heads, tokens) in enumerate(((4, 150), (2, 90), (2, 90)))
    )
    may_read = normal(2, 1, 150, 90, seed=3) > 0 if mask else None
    expected = sage_attention(recipe, q, k, v, may_read, causal=not mask)
    far = [x if x is None else x.to(second) for x in (q, k, v, may_read)]
    found = sage_attention(recipe, *far, causal=not mask)
    assert found.device == second
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [True, "nvfp4"])
def test_a_model_with_quantized_attention_runs_there(attention, model, second):
    target = model.target(attention=attention)
    recipe = ModelRecipe({}, attention=nearest(target, bits_of("w8a8"), {}).attention | dict(target.attention_given))
    inputs = model.step_inputs(1)
    dtype = torch.float32
    with torch.no_grad():
        near = build(target, recipe, dtype=dtype)(**placed(inputs, dtype, "cpu")).sample
        plain = build(target, ModelRecipe({}), dtype=dtype)(**placed(inputs, dtype, "cpu")).sample
        far = build(target, recipe, dtype=dtype, device=second)(**placed(inputs, dtype, second)).sample
    assert recipe.attention and not torch.equal(near, plain)
    torch.testing.assert_close(far.cpu(), near, rtol=1e-4, atol=1e-5)
