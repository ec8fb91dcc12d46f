from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ditbench.harness.build.attention import OPERANDS, QuantAttnProcessor
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.fitting.conformance import STATIC, relative_error
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation
from ditbench.harness.quant.recipe import AttentionRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepClock

A8 = ActQuant(QuantSpec(8, "per_tensor", symmetric=False, dynamic=True))
A2 = ActQuant(QuantSpec(2, "per_tensor", symmetric=False, dynamic=True))


@pytest.fixture
def attention(small_model) -> Attention:
    return float_copy(small_model.target(), dtype=torch.float64).transformer_blocks[0].attn1


def by_hand(attention: Attention, x: Tensor, quant: dict[str, ActQuant]) -> Tensor:
    def rounded(name: str, tensor: Tensor) -> Tensor:
        return fake_quantize_activation(tensor, quant[name]) if name in quant else tensor

    projected = {n: linear(x) for n, linear in (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v))}
    heads = []
    q = rounded("query", projected["q"] / 24**0.5)
    k, v = rounded("key", projected["k"]), rounded("value", projected["v"])
    maps = torch.stack([(q[..., h : h + 24] @ k[..., h : h + 24].mT).softmax(-1) for h in (0, 24)], 1)
    maps = rounded("probabilities", maps)
    for index, start in enumerate((0, 24)):
        heads.append(maps[:, index] @ v[..., start : start + 24])
    return attention.to_out[0](torch.cat(heads, -1))


def test_without_quantizers_it_is_the_attention_of_diffusers(attention, normal):
    x = normal(3, 16, 48)
    with torch.no_grad():
        expected = attention(x)
        attention.set_processor(QuantAttnProcessor(AttentionRecipe(), StepClock(None)))
        torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [*((name,) for name in OPERANDS), OPERANDS], ids="+".join)
def test_each_operand_passes_its_own_quantizer(names, attention, normal):
    """q after its scaling by 1/√d, the map after the softmax."""
    x, quant = normal(3, 16, 48), dict.fromkeys(names, A2)
    with torch.no_grad():
        expected, unrounded = by_hand(attention, x, quant), by_hand(attention, x, {})
        attention.set_processor(QuantAttnProcessor(AttentionRecipe(**quant), StepClock(None)))
        output = attention(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert relative_error(output, unrounded) > 1e-3


def test_an_observer_sees_the_operands_before_rounding(attention, normal):
    seen: dict[str, Tensor] = {}
    attention.set_processor(QuantAttnProcessor(AttentionRecipe(query=A2), StepClock(None), seen.__setitem__))
    x = normal(3, 16, 48)
    with torch.no_grad():
        attention(x)
        query = (attention.to_q(x) / 24**0.5).unflatten(-1, (2, 24)).transpose(1, 2)
    assert set(seen) == set(OPERANDS)
    torch.testing.assert_close(seen["query"], query)
    torch.testing.assert_close(seen["probabilities"].sum(-1), torch.ones(3, 2, 16, dtype=torch.float64))


def test_cross_attention_and_masks_are_refused(attention, normal):
    attention.set_processor(QuantAttnProcessor(AttentionRecipe(), StepClock(None)))
    with pytest.raises(NotImplementedError, match="self-attention"):
        attention(normal(1, 16, 48), encoder_hidden_states=normal(1, 4, 48))


def test_a_protocol_that_asks_for_it_gets_static_operand_ranges(small_model, small_calibration):
    """q, k, v at the activation width, the softmax map at 8 bits, ranges from the calibration."""
    target = small_model.target(attention=True)
    bits = STATIC.with_widths(8, 6)
    state = static_ranges(target, bits, small_calibration)
    recipe = nearest(target, bits, state)
    assert set(recipe.attention) == set(target.attention) and len(target.attention) == 2
    for name, attention in recipe.attention.items():
        assert [getattr(attention, o).spec.bits for o in OPERANDS] == [6, 6, 6, 8]
        assert 0 < float(state[f"{name}.probabilities/act_high"]) <= 1
        assert float(state[f"{name}.query/act_low"]) < 0 < float(state[f"{name}.query/act_high"])
    inputs = small_model.step_inputs(3)
    with torch.no_grad():
        plain = build(target, ModelRecipe(recipe.layers), dtype=torch.float32)(**inputs).sample
        operands = build(target, recipe, dtype=torch.float32)(**inputs).sample
    assert 1e-4 < relative_error(operands, plain) < 0.2


def test_the_default_protocol_leaves_the_operands_alone(small_target):
    assert small_target.attention == ()
