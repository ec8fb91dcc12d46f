"""Attention with quantized operands: inside of the attention modules that a recipe names, `F.scaled_dot_product_attention` is ours.

Whatever processor a family has ends in that function (its own, or through diffusers' dispatch), with q, k and v as they are multiplied: normed,
turned, text and image tokens side by side, of fused projections or not. So one place quantizes self-, cross-, joint and masked attention
of every family. What does not end there (linear attention) is refused when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditbench.harness.build.variants import plain, variant
from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation
from ditbench.harness.quant.recipe import AttentionRecipe, to_device
from ditbench.harness.quant.sage import SageRecipe, sage_attention
from ditbench.harness.quant.softmax_maps import for_each_head, masked, reads_nothing
from ditbench.harness.quant.steps import StepClock

OPERANDS = ("query", "key", "value", "probabilities")


def quantize_attention(
    model: nn.Module, name: str, recipe: AttentionRecipe | SageRecipe, clock: StepClock, device: torch.device | str
) -> None:
    """In place, in the module of that name; device: where the model computes."""
    attend = (
        Sage(recipe)
        if isinstance(recipe, SageRecipe)
        else QuantAttention(to_device(recipe, torch.device(device)), clock)
    )
    set_attention(model, name, attend)


def set_attention(model: nn.Module, name: str, attend: Callable[..., Tensor] | None) -> None:
    """What the module of that name calls instead of `F.scaled_dot_product_attention`; None puts that back."""
    module = model.get_submodule(name)
    module.__class__ = plain(type(module))  # whose attention another kernel may have computed (`fusion`)
    if attend is None:
        module.__dict__.pop("attend", None)
        return
    module.__class__ = attending(type(module))  # type: ignore[arg-type]
    module.attend, module.attention_name = attend, name  # type: ignore[assignment]


class Instead(TorchFunctionMode):
    """Hands what `F.scaled_dot_product_attention` gets to another function. calls: how often."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attend(*args, **(kwargs or {}))


@cache
def attending(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of module, whose forward calls its `attend`."""
    original = kind.forward  # by its own name: a compiler does not follow `kind.forward`

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        instead = Instead(self.attend)
        with instead:
            output = original(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and not instead.calls:
            raise UserError(
                f"{self.attention_name}: its attention ({type(getattr(self, 'processor', self)).__name__}) is no softmax(q kᵀ) v "
                "that torch computes, so its operands cannot be quantized; set protocol.attention=false"
            )
        return output

    return variant(kind, forward, attending, (kind,))


class Attends:
    """What is called with the arguments of `F.scaled_dot_product_attention`: q (B, N, T, D), k and v (B, M, S, D) → (B, N, T, D) in the dtype of q."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise NotImplementedError(f"quantized attention is for inference; got dropout_p {dropout_p}")
        return self.attended(query, key, value, attn_mask, is_causal, scale)

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        raise NotImplementedError


class QuantAttention(Attends):
    """softmax(Q̂ K̂ᵀ) V̂ written out, with Q̂ = quantize(q / √d) (PTQ4DiT, RepQ-ViT): q, k, v and the map pass a quantizer each.

    `observe(operand, tensor)`, if given, sees each operand before it is quantized (calibration uses it).
    """

    def __init__(
        self, recipe: AttentionRecipe, clock: StepClock, observe: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self.quant: dict[str, ActQuant | None] = {name: getattr(recipe, name) for name in OPERANDS}
        self.clock, self.observe = clock, observe

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        dtype, heads = query.dtype, query.shape[1]
        query = self._operand("query", query * (query.shape[-1] ** -0.5 if scale is None else scale))
        key, value = self._operand("key", key), self._operand("value", value)
        key, value = (for_each_head(x, heads) for x in (key, value))
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32))
        if mask is None and not causal:
            probabilities = scores.softmax(-1)
        else:
            scores = masked(scores, mask, 0 if causal else None)
            probabilities = scores.softmax(-1).masked_fill(reads_nothing(scores), 0)
        probabilities = self._operand("probabilities", probabilities)
        return (probabilities.to(value.dtype) @ value).to(dtype)

    def _operand(self, name: str, tensor: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(name, tensor)
        quant = self.quant[name]
        return tensor if quant is None else fake_quantize_activation(tensor, quant, self.clock.step).to(tensor.dtype)


class Sage(Attends):
    """A form of the protocol's."""

    def __init__(self, recipe: SageRecipe) -> None:
        self.recipe = recipe

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        return sage_attention(self.recipe, query, key, value, mask, causal=causal, scale=scale)
