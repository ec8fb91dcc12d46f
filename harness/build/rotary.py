"""Rotary positions in a quantized model's attention: one pass over queries and keys, which is rounded once as theirs is.

diffusers has one function for many families (FLUX, FLUX.2, Chroma, …), which a processor finds by its name; Wan's processor has its own inside.
What is called otherwise than these, in another dtype, on a device without this kernel, with gradients, or by a compiler, is computed by torch.
"""

from __future__ import annotations

from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.backends.between import kernels_of
from ditbench.harness.build.pending import settled
from ditbench.harness.build.variants import plain, variant

NAME = "apply_rotary_emb"
WAN = "diffusers.models.transformers.transformer_wan.WanAttnProcessor"


def fuse_rotary(model: nn.Module) -> None:
    """In place: processors become variants of themselves."""
    from diffusers.models import embeddings  # seconds; and triton, which must not come first

    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        kind: Any = type(processor)
        if processor is None or plain(kind) is not kind:
            continue
        if f"{kind.__module__}.{kind.__name__}" == WAN:
            processor.__class__ = rotating_in_norms(kind)  # type: ignore[arg-type]
        elif getattr(kind.__call__, "__globals__", {}).get(NAME) is embeddings.apply_rotary_emb:
            processor.__class__ = rotating(kind)  # type: ignore[arg-type]


@cache
def rotating(kind: type[Any]) -> type[Any]:
    """The same kind of processor, in whose code diffusers' function is ours."""
    original = kind.__call__
    names = {**original.__globals__, NAME: apply_rotary_emb}
    ours = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    ours.__kwdefaults__ = original.__kwdefaults__

    @wraps(original)  # whose arguments attention modules look at
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if torch.compiler.is_compiling() else ours(self, *args, **kwargs)

    return variant(kind, call, rotating, (kind,), name="__call__")


def apply_rotary_emb(
    x: Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
) -> Tensor:
    """As diffusers'; of x (B, T, N, D) by our kernel."""
    from diffusers.models.embeddings import apply_rotary_emb as theirs

    usual = use_real and use_real_unbind_dim == -1 and sequence_dim == 1 and x.dim() == 4
    if not (usual and _takes(x) and freqs_cis[0].dim() == 2):
        return theirs(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)  # type: ignore[return-value]
    return rotated(x, *freqs_cis)


@cache
def rotating_in_norms(kind: type[Any]) -> type[Any]:
    """Wan's processor, to which the norms of queries and keys, which come right before, give positions as well."""
    original = kind.__call__

    @wraps(original)
    def call(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if rotary_emb is not None and not torch.compiler.is_compiling() and _takes(hidden_states):
            cosine, sine = rotary_emb  # (1, T, 1, D), of which it reads every second value
            cosine, sine = (
                each.flatten(0, 2).repeat_interleave(2, -1) for each in (cosine[..., 0::2], sine[..., 1::2])
            )
            attn, rotary_emb = _Rotating(attn, cosine, sine), None
        return original(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    return variant(kind, call, rotating_in_norms, (kind,), name="__call__")


class _Rotating:
    """An attention module whose norms of queries and keys rotate what they give."""

    def __init__(self, attn: Any, cosine: Tensor, sine: Tensor) -> None:
        self._attn, self._tables = attn, (cosine, sine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def norm_q(self, x: Tensor) -> Tensor:
        return self._rotated(self._attn.norm_q(x))

    def norm_k(self, x: Tensor) -> Tensor:
        return self._rotated(self._attn.norm_k(x))

    def _rotated(self, x: Tensor) -> Tensor:
        x = settled(x)
        return rotated(x.unflatten(2, (self._attn.heads, -1)), *self._tables).view(x.shape)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (B, T, N, D) in bfloat16; cosine, sine (T, D)."""
    kernels = kernels_of(x.device)
    assert kernels is not None
    return kernels.rotary(settled(x).contiguous(), cosine, sine)


def _takes(x: Tensor) -> bool:
    learns = torch.is_grad_enabled() and x.requires_grad
    return x.dtype == torch.bfloat16 and not learns and kernels_of(x.device) is not None
