from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ditbench.harness.build import attention as module
from ditbench.harness.build.attention import OPERANDS, QuantAttention, Sage, set_attention
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.build.export import load_quantized, save_quantized
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import STATIC, relative_error
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation
from ditbench.harness.quant.recipe import AttentionRecipe, ModelRecipe
from ditbench.harness.quant.sage import FORMS, sage_attention
from ditbench.harness.quant.spec import QuantSpec, bits_of
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.stages.states import with_attention_given

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
        set_attention(attention, "", QuantAttention(AttentionRecipe(), StepClock(None)))
        torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [*((name,) for name in OPERANDS), OPERANDS], ids="+".join)
def test_each_operand_passes_its_own_quantizer(names, attention, normal):
    """q after its scaling by 1/√d, the map after the softmax."""
    x, quant = normal(3, 16, 48), dict.fromkeys(names, A2)
    with torch.no_grad():
        expected, unrounded = by_hand(attention, x, quant), by_hand(attention, x, {})
        set_attention(attention, "", QuantAttention(AttentionRecipe(**quant), StepClock(None)))
        output = attention(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert relative_error(output, unrounded) > 1e-3


def test_an_observer_sees_the_operands_before_rounding(attention, normal):
    seen: dict[str, Tensor] = {}
    set_attention(attention, "", QuantAttention(AttentionRecipe(query=A2), StepClock(None), seen.__setitem__))
    x = normal(3, 16, 48)
    with torch.no_grad():
        attention(x)
        query = (attention.to_q(x) / 24**0.5).unflatten(-1, (2, 24)).transpose(1, 2)
    assert set(seen) == set(OPERANDS)
    torch.testing.assert_close(seen["query"], query)
    torch.testing.assert_close(seen["probabilities"].sum(-1), torch.ones(3, 2, 16, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["cross", "mask", "causal", "grouped", "scale"])
def test_what_torchs_function_takes_it_takes(kind, normal):
    """Without rounding, so that torch is the reference; a row that may read nothing is 0."""
    q, k, v = normal(2, 4, 7, 8), normal(2, 4, 9, 8, seed=1), normal(2, 4, 9, 8, seed=2)
    more: dict[str, Any] = {"scale": 0.7} if kind == "scale" else {"is_causal": True} if kind == "causal" else {}
    if kind == "mask":
        more = {"attn_mask": normal(2, 1, 7, 9, seed=3) > 0}
        more["attn_mask"][1, :, 2] = False
    if kind == "grouped":
        k, v, more = k[:, :2], v[:, :2], {"enable_gqa": True}
    found = QuantAttention(AttentionRecipe(), StepClock(None))(q, k, v, **more)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **more), rtol=1e-10, atol=1e-10)


def test_with_dropout_it_is_refused(normal):
    for attend in (QuantAttention(AttentionRecipe(), StepClock(None)), Sage(FORMS["int8"])):
        with pytest.raises(NotImplementedError, match="for inference; got dropout_p 0.5"):
            attend(*[normal(1, 1, 2, 2)] * 3, dropout_p=0.5)


def test_an_attention_that_never_calls_torchs_function_is_refused_when_it_runs(attention, normal):
    """Linear attention, say, in a family that nobody looked at."""
    attention.set_processor(lambda attn, hidden_states, **more: attn.to_v(hidden_states))
    set_attention(attention, "", Sage(FORMS["int8"]))
    with pytest.raises(UserError, match=r"is no softmax\(q kᵀ\) v .*; set protocol.attention=false"):
        attention(normal(1, 16, 48))


@pytest.mark.parametrize("attend", [QuantAttention(AttentionRecipe(query=A2), StepClock(None)), Sage(FORMS["nvfp4"])])
def test_a_module_is_what_it_was_in_copies_pickles_and_when_it_is_put_back(attend, attention, normal):
    x = normal(1, 16, 48)
    with torch.no_grad():
        before = attention(x)
        set_attention(attention, "", attend)
        changed = attention(x)
        assert isinstance(attention, Attention) and not torch.equal(changed, before)
        assert torch.equal(copy.deepcopy(attention)(x), changed)
        assert torch.equal(pickle.loads(pickle.dumps(attention))(x), changed)
        run = torch.compile(lambda x: attention(x), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(x), changed)
        set_attention(attention, "", None)
        assert type(attention) is Attention and torch.equal(attention(x), before)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_keeps_a_form(form, small_model, tmp_path):
    target = small_model.target(attention=form)
    recipe = with_attention_given(target, nearest(target, bits_of("w8a8"), {}))
    inputs = small_model.step_inputs(2)
    save_quantized(tmp_path / "export", target, recipe, dtype=torch.float32, about={})
    loaded = load_quantized(tmp_path / "export", small_model.transformer, backend="simulate")
    plain = build(target, nearest(target, bits_of("w8a8"), {}), dtype=torch.float32, backend="simulate")
    built = build(target, recipe, dtype=torch.float32, backend="simulate")
    with torch.no_grad():
        found, expected, without = (each(**inputs).sample for each in (loaded, built, plain))
    assert torch.equal(found, expected) and 1e-4 < relative_error(expected, without) < 0.3


def test_a_form_holds_in_bfloat16_where_another_kernel_would_compute_attention(small_model, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "sage_attention", lambda *a, **k: seen.append(a[1].dtype) or sage_attention(*a, **k))
    target = small_model.target(attention="int8")
    built = build(target, with_attention_given(target, nearest(target, bits_of("w8a8"), {})), dtype=torch.bfloat16)
    inputs = {
        n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
        for n, x in small_model.step_inputs(2).items()
    }
    with torch.no_grad():
        built(**inputs)
    assert seen == [torch.bfloat16] * len(target.blocks)


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
