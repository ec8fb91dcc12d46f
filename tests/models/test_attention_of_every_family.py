"""Operands of attention in every family: what is quantized is what runs, and is what is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import MADE, small_model
from small_pipelines import SIZES, wan_of_two_experts
from torch import Tensor

from ditbench.harness.build import attention as building
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.experts import within
from ditbench.harness.quant.layer_names import linear_names
from ditbench.harness.quant.recipe import AttentionRecipe, ModelRecipe
from ditbench.harness.quant.sage import FORMS

CROSS = (  # q and k of unequal length here
    "sana", "sana_video", "wan", "ltx", "latte", "hunyuan_dit", "opensora", "kandinsky5", "kandinsky5_t2i", "ltx2",
)  # fmt: skip
MASKED = ("pixart", "chroma", "hunyuan_video", "hunyuan_video15", "opensora", "sana", "sana_video", "ltx", "ltx2")


class Watched:
    """In the place of the forms' function: what each module's products are, and whether q and k differ or are masked."""

    def __init__(self, monkeypatch: Any) -> None:
        self.macs: Counter[str] = Counter()
        self.cross = self.masked = False
        self.attend = building.sage_attention
        monkeypatch.setattr(building.Sage, "__call__", self._called())

    def _called(self) -> Any:
        def called(
            sage: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **more: Any
        ) -> Tensor:
            self.macs[sage.where] += query.numel() * key.shape[-2] + query[..., 0].numel() * value[0, 0].numel()
            self.cross |= query.shape[-2] != key.shape[-2]
            self.masked |= attn_mask is not None
            return self.attend(sage.recipe, query, key, value, attn_mask, scale=more.get("scale"))

        return called

    def name(self, model: torch.nn.Module, names: Any) -> None:
        for each in names:
            model.get_submodule(each).attend.where = each


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_form_rounds_every_softmax_of_a_family_and_they_are_what_is_counted(name, monkeypatch):
    model, watched = small_model(name), Watched(monkeypatch)
    target = model.target(attention="int8")
    recipe = ModelRecipe({}, attention=dict(target.attention_given))
    built, inputs = build(target, recipe, dtype=torch.float32), model.step_inputs(1)
    watched.name(built, recipe.attention)
    with torch.no_grad():
        found = built(**inputs)
        plain = float_copy(target, dtype=torch.float32)(**inputs)
    found, plain = (
        torch.cat([x.flatten() for x in (each if isinstance(each, tuple) else (each.sample,))[0]])
        for each in (found, plain)
    )
    assert 1e-6 < relative_error(found, plain) < 0.2
    assert watched.macs == {each: model.macs[each] for each in recipe.attention} and target.attention == ()
    inside = {each for each in model.macs if any(each.startswith(f"{block}.") for block in target.blocks)}
    assert set(recipe.attention) == inside - set(linear_names(model.transformer))
    assert watched.cross == (name in CROSS) and watched.masked == (name in MASKED)
    bits, _ = account(target, recipe, model.macs, "")
    assert bits["mac_share_quantized"] == pytest.approx(sum(watched.macs.values()) / model.macs[""])
    assert 8 <= bits["attention_bits_effective"] < 16


@pytest.mark.parametrize("name", ["flux", "opensora", "lumina2", "wan", "generic"])
def test_what_methods_quantize_is_rounded_in_other_families_too(name):
    """`protocol.attention=true`, whose ranges methods find: joint, fused, with rotary embeddings, masked and across."""
    model = small_model(name)
    target = model.target(attention=True)
    seen: Counter[str] = Counter()
    built, inputs = float_copy(target, dtype=torch.float32), model.step_inputs(1)
    with torch.no_grad():
        plain = built(**inputs).sample
        for each in target.attention:
            observe = lambda operand, x, each=each: seen.update([f"{each}.{operand}"])  # noqa: E731
            attend = building.QuantAttention(AttentionRecipe(), built.clock, observe)
            building.set_attention(built, each, attend)
        torch.testing.assert_close(built(**inputs).sample, plain, rtol=1e-4, atol=1e-5)
    assert target.attention and target.attention_given == {}
    assert set(seen) == {f"{each}.{operand}" for each in target.attention for operand in building.OPERANDS}


def test_linear_attention_stays_in_float_and_one_that_is_no_softmax_is_refused_when_it_runs():
    model = small_model("sana")
    assert {name.rpartition(".")[2] for name in model.target(attention="fp8").attention_given} == {"attn2"}
    model.adapter = replace(model.adapter, LINEAR_ATTENTION="")
    target = model.target(attention="fp8")
    built = build(target, ModelRecipe({}, attention=dict(target.attention_given)), dtype=torch.float32)
    with pytest.raises(UserError, match=r"attn1: its attention \(SanaLinearAttnProcessor2_0\) is no softmax"):
        built(**model.step_inputs(1))


def test_pixart_keeps_what_its_protocol_meant_and_a_form_means_all():
    model = small_model("pixart")
    kinds = {name.rpartition(".")[2] for name in model.target(attention=True).attention}
    assert kinds == {"attn1"}
    assert {name.rpartition(".")[2] for name in model.target(attention="int8").attention_given} == {"attn1", "attn2"}


def test_scope_and_skip_say_which_modules_get_a_form():
    model = small_model("hunyuan_video")
    inside, everywhere = (set(model.target(scope, attention="int8").attention_given) for scope in ("blocks", "all"))
    assert {name.partition(".")[0] for name in everywhere - inside} == {"context_embedder"} and inside < everywhere
    assert set(model.macs) >= everywhere
    skipped = model.target(skip=[r"^transformer_blocks\.0\."], attention="int8").attention_given
    assert {name for name in inside if not name.startswith("transformer_blocks.0.")} == set(skipped)
    with pytest.raises(
        UserError, match="has no softmax attention that protocol.scope=blocks .* set protocol.attention=false"
    ):
        model.target(skip=["attn$"], attention="int8")


def test_fused_projections_are_rounded_behind_the_fused_layer():
    plain, fused = small_model("flux"), small_model("flux")
    fuse_qkv(fused.transformer)
    outputs = []
    for model in (plain, fused):
        target = model.target(attention="nvfp4")
        built = build(target, ModelRecipe({}, attention=dict(target.attention_given)), dtype=torch.float32)
        with torch.no_grad():
            outputs.append(built(**model.step_inputs(1)).sample)
    assert relative_error(outputs[1], outputs[0]) < 0.05  # products of other shapes may fall on the other side of a tie


def test_two_experts_have_a_form_each_under_their_own_names(tmp_path):
    torch.manual_seed(0)
    wan_of_two_experts().save_pretrained(tmp_path)
    model = load_model(ModelSpec("small-wan2.2", "wan", source=str(tmp_path), size=SIZES["wan"]))
    target = model.target(attention="int8")
    first = within(target, "transformer")
    assert set(first.attention_given) == {f"blocks.{i}.attn{kind}" for i in (0, 1) for kind in (1, 2)}
    assert len(target.attention_given) == 2 * len(first.attention_given)
    assert all(model.macs[name] > 0 for name in target.attention_given)


@pytest.mark.parametrize("form", FORMS)
def test_forms_err_little_in_a_joint_attention(form):
    model = small_model("sd3")
    target, inputs = model.target(attention=form), model.step_inputs(2)
    with torch.no_grad():
        plain = float_copy(target, dtype=torch.float32)(**inputs).sample
        built = build(target, ModelRecipe({}, attention=dict(target.attention_given)), dtype=torch.float32)
        found = built(**inputs).sample
    assert relative_error(found, plain) < {"nvfp4": 0.2}.get(form, 0.05)
