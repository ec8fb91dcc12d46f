"""What stands around the products of a quantized model is computed by kernels of ours, where the device has them.

Attention, on CPUs: whatever processor a family has ends in `F.scaled_dot_product_attention`; inside of attention modules, and nowhere else,
that name means our kernel. Activations behind a quantized layer become the end of its product. Norms, modulations and gates of
blocks: `blocks.py`; rotary positions: `rotary.py`. On CPUs float layers that have one row per sample (of timesteps, labels, modulations) read their weights once, as they lie.

The float model is left as it is: it is what speed and samples are compared with.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditbench.harness.backends.activations import GELU_ERF, GELU_TANH, SILU
from ditbench.harness.backends.attention import attention, lacks
from ditbench.harness.backends.between import kernels_of
from ditbench.harness.backends.few_rows import SteadyLinear
from ditbench.harness.build.blocks import fuse_blocks
from ditbench.harness.build.layer import QuantLinear, RangedLinear
from ditbench.harness.build.rotary import fuse_rotary
from ditbench.harness.build.variants import variant


def fuse(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """In place. device: where the model computes."""
    rounds = any(isinstance(module, QuantLinear) and module.rounds for module in model.modules())
    if not rounds or dtype != torch.bfloat16:
        return
    if device.type == "cpu":
        fuse_patches(model)
        if lacks() is None:
            fuse_attention(model)
            fuse_few_rows(model)
    if kernels_of(device) is not None:
        if device.type != "cpu":
            fuse_attention(model, _plain()[:1])
        fuse_activations(model)
        fuse_rotary(model)
        fuse_blocks(model)


class OurAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = attention
        elif func is Tensor.unflatten:
            func = torch.unflatten  # the method calls its super(), which a compiler does not follow from here
        return func(*args, **(kwargs or {}))


@cache
def with_our_attention(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of module, whose forward runs under `OurAttention`."""
    original = kind.forward  # by its own name: a compiler does not follow `kind.forward`

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with OurAttention():
            return original(self, *args, **kwargs)

    def directly(
        self: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, **more}
        if not torch.compiler.is_compiling() and _only_attends(self, hidden_states, **given):
            return _attended(self, hidden_states, encoder_hidden_states)
        with OurAttention():
            return original(self, hidden_states, **given)

    return variant(kind, directly if kind is _plain()[0] else forward, with_our_attention, (kind,))


@cache
def _plain() -> tuple[type[Any], type[Any]]:
    """diffusers' own attention and processor, of which many families' are no subclasses."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    return Attention, AttnProcessor2_0


def _only_attends(
    attn: Any, x: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None, **more: Any
) -> bool:
    """Whether diffusers' processor would project, attend and project, and nothing else."""
    if type(attn.processor) is not _plain()[1] or attention_mask is not None or more or x.dim() != 3:
        return False
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k)
    crosses = encoder_hidden_states is not None and attn.norm_cross
    adds = attn.residual_connection or attn.rescale_output_factor != 1 or attn.training
    return not crosses and not adds and all(norm is None for norm in norms)


def _attended(attn: Any, x: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    """What the processor does, without looking at its signature, a mode, and a division by one."""
    seen = x if encoder_hidden_states is None else encoder_hidden_states
    projected = (attn.to_q(x), attn.to_k(seen), attn.to_v(seen))
    q, k, v = (y.view(*y.shape[:2], attn.heads, -1).transpose(1, 2) for y in projected)
    return attn.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


def fuse_attention(model: nn.Module, kinds: tuple[type[Any], ...] | None = None) -> None:
    """Attention modules are what diffusers gives a processor. kinds: these alone, where the device has no attention of ours, but what
    diffusers' processor does around it (a division by one) is to be left out.
    """
    for module in model.modules():
        wanted = kinds is None or type(module) in kinds
        if wanted and hasattr(module, "processor") and hasattr(module, "set_processor"):
            module.__class__ = with_our_attention(type(module))  # type: ignore[arg-type]


class FewRowsLinear(SteadyLinear):
    """Rows (B, C) go to our kernel, tokens (B, T, C) to torch: how many there are decides nothing."""

    def forward(self, input: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        moved = input.device.type != "cpu"  # the model was, after it had been built
        if moved or input.dim() != 2 or learns or not input.dtype == self.weight.dtype == torch.bfloat16:
            return super().forward(input)
        return torch.ops.ditbench_vnni.few_rows(input.contiguous(), self.weight.contiguous(), self.bias)


def fuse_few_rows(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is SteadyLinear:
            module.__class__ = FewRowsLinear


@cache
def channels_last(kind: type[Any]) -> type[Any]:
    """The same kind of convolution, whose result has the channels of a place side by side, as tokens have them: the same bits."""

    def forward(self: Any, input: Tensor) -> Tensor:
        last = torch.channels_last
        return nn.Conv2d.forward(self, input.contiguous(memory_format=last)).contiguous(memory_format=last)

    return variant(kind, forward, channels_last, (kind,))


def fuse_patches(model: nn.Module) -> None:
    """Patch embeddings in float: what adds positions and the first block would go over tokens that lie across one another."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size == module.stride:
            module.__class__ = channels_last(nn.Conv2d)


@cache
def ending_in(kind: type[Any], activation: str) -> type[Any]:
    """The same kind of module, whose first projection ends in the activation."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        return self.proj(hidden_states, activation)

    return variant(kind, forward, ending_in, (kind, activation))


def fuse_activations(model: nn.Module) -> None:
    """Those of feed-forward layers whose first projection is quantized."""
    from diffusers.models.activations import GELU, LinearActivation  # seconds; and triton, which must not come first

    for module in model.modules():
        if not isinstance(getattr(module, "proj", None), QuantLinear | RangedLinear):
            continue
        if type(module) is GELU:
            module.__class__ = ending_in(GELU, GELU_TANH if module.approximate == "tanh" else GELU_ERF)
        elif type(module) is LinearActivation and isinstance(module.activation, nn.SiLU):
            module.__class__ = ending_in(LinearActivation, SILU)
