"""Transformer blocks of a quantized model whose norms, modulations and gates are computed by kernels of ours.

Between two products there are two passes over the tokens: gate and residual; norm and modulation, whose result is handed to the layers
that read it together with their codes. Both round once, at their end. A block of any kind runs as it is written, its steps put off until they are
whole (`pending.py`). Of diffusers' `BasicTransformerBlock` those with modulation, adaLN-zero (DiT) and adaLN-single (PixArt, Latte),
are written out here: they are called in small models too, where every call of Python counts. A block that is called as
these are not, or in another dtype, on a device without these kernels, with gradients, or by a compiler, does what diffusers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.backends.between import kernels_of
from ditbench.harness.build.layer import QuantLinear, RangedLinear
from ditbench.harness.build.pending import Between, Form, Norm, Pending, gated, put_off_rms_norm, settled
from ditbench.harness.build.variants import plain, variant

ZERO, SINGLE = "ada_norm_zero", "ada_norm_single"


def fuse_blocks(model: nn.Module) -> None:
    """In place."""
    from diffusers.models.attention import BasicTransformerBlock  # seconds; and triton, which must not come first
    from diffusers.models.normalization import RMSNorm

    for block in blocks_of(model):
        if type(block) is BasicTransformerBlock and has_our_form(block):
            block.__class__ = modulated_by_us(BasicTransformerBlock)
        else:
            kind: Any = type(block)
            block.__class__ = put_off(kind)

    for norm in model.modules():
        if type(norm) is RMSNorm and len(norm.dim) == 1 and norm.bias is None:
            norm.__class__ = put_off_norm(RMSNorm)


@cache
def put_off_norm(kind: type[Any]) -> type[Any]:
    """The same kind of RMSNorm, which in a block is one step; diffusers' is several."""
    original = kind.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        made = None if compiling else put_off_rms_norm(hidden_states, self.weight, self.eps)
        return original(self, hidden_states) if made is None else made

    return variant(kind, forward, put_off_norm, (kind,))


def blocks_of(model: nn.Module) -> Iterator[Any]:
    """The outermost modules in lists that have quantized layers."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                quantized = any(isinstance(part, QuantLinear) for part in block.modules())
                if (
                    quantized
                    and not isinstance(block, QuantLinear | RangedLinear)
                    and plain(type(block)) is type(block)
                ):
                    yield block
        else:
            yield from blocks_of(module)


@cache
def put_off(kind: type[Any]) -> type[Any]:
    """The same kind of block, whose steps between products are put off."""
    original = kind.forward  # by its own name: a compiler does not follow `kind.forward`

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, Tensor) and _ours(x) for x in (*args, *kwargs.values())):
            return original(self, *args, **kwargs)
        with Between():
            return settled(original(self, *args, **kwargs))

    return variant(kind, forward, put_off, (kind,))


def has_our_form(block: Any) -> bool:
    if block.norm_type not in (ZERO, SINGLE) or block.pos_embed is not None or hasattr(block, "fuser"):
        return False
    if block.norm_type == ZERO and block.attn2 is not None:
        return False
    return all(type(norm) is nn.LayerNorm and norm.weight is None for norm in _norms(block))


@cache
def modulated_by_us(kind: type[Any]) -> type[Any]:
    """The same kind of block; its parts are called in diffusers' order."""
    original = kind.forward  # by its own name: a compiler does not follow `kind.forward`

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x = hidden_states
        if cross_attention_kwargs or self._chunk_size is not None or not _ours(x):
            return original(
                self,
                hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
                added_cond_kwargs=added_cond_kwargs,
            )
        x, norms = x.contiguous(), _norms(self)  # behind a patch embedding channels are not side by side
        shift_1, factor_1, gate_1, shift_2, factor_2, gate_2 = _modulation(self, x, timestep, class_labels)
        normed = modulated(x, factor_1, shift_1, norms[0].eps)
        text = encoder_hidden_states if self.only_cross_attention else None
        x = gated(x, gate_1, self.attn1(normed, encoder_hidden_states=text, attention_mask=attention_mask))
        if self.attn2 is not None:
            seen = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            x = self.attn2(x, **seen) + x
        normed = modulated(x, factor_2, shift_2, norms[1].eps)
        return gated(x, gate_2, self.ff(normed))

    return variant(kind, forward, modulated_by_us, (kind,))


def _ours(x: Tensor) -> bool:
    """Whether tokens (B, T, C) are what our kernels take."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return x.dim() == 3 and x.dtype == torch.bfloat16 and kernels_of(x.device) is not None


def _norms(block: Any) -> tuple[Any, Any]:
    """Before the attention and before the feed-forward network."""
    return (block.norm1.norm, block.norm3) if block.norm_type == ZERO else (block.norm1, block.norm2)


def _modulation(block: Any, x: Tensor, timestep: Any, class_labels: Any) -> tuple[Tensor, ...]:
    """Shift, 1 + scale and gate, float32 (B, C), of the attention and of the feed-forward network; as few steps as can be."""
    if block.norm_type == SINGLE:
        rows = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
    else:
        norm = block.norm1
        emb = timestep if norm.emb is None else norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
        rows = norm.linear(norm.silu(emb)).unflatten(1, (6, -1))
    rows = rows.to(x.dtype).float()
    rows[:, 1::3].add_(1)
    return rows.unbind(1)


def modulated(x: Tensor, factor_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) · factor + shift of x (B, T, C); computed when it is read, with the reader's codes."""
    return Pending.of(Form(x, Norm(eps, centred=True), factor_BC, shift_BC))
