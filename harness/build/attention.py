"""Attention with quantized operands (PTQ4DiT, RepQ-ViT): q, k, v and the softmax map pass a quantizer each.

Only protocols that ask for it install this processor; the default keeps diffusers' fused attention untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation
from ditbench.harness.quant.steps import StepClock

if TYPE_CHECKING:
    from ditbench.harness.quant.recipe import AttentionRecipe

OPERANDS = ("query", "key", "value", "probabilities")


def set_processor(model: nn.Module, attention: str, processor: QuantAttnProcessor) -> None:
    """Install the processor in the named diffusers `Attention` module of model."""
    model.get_submodule(attention).set_processor(processor)  # type: ignore[operator]


class QuantAttnProcessor:
    """Self-attention written out: softmax(Q̂ K̂ᵀ) V̂ with Q̂ = quantize(q / √d).

    `observe(operand, tensor)`, if given, sees each operand before it is quantized (calibration uses it).
    """

    def __init__(self, recipe: AttentionRecipe, clock: StepClock, observe=None) -> None:
        self.quant: dict[str, ActQuant | None] = {name: getattr(recipe, name) for name in OPERANDS}
        self.clock, self.observe = clock, observe

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise NotImplementedError("operand quantization is defined for plain self-attention")
        heads = (attn.heads, -1)
        query, key, value = (
            linear(hidden_states).unflatten(-1, heads).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        dtype = query.dtype
        query = self._operand("query", query * query.shape[-1] ** -0.5)
        key, value = self._operand("key", key), self._operand("value", value)
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32))
        probabilities = self._operand("probabilities", scores.softmax(-1))
        output = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2).to(dtype)
        return attn.to_out[1](attn.to_out[0](output))

    def _operand(self, name: str, tensor: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(name, tensor)
        quant = self.quant[name]
        return tensor if quant is None else fake_quantize_activation(tensor, quant, self.clock.step).to(tensor.dtype)
