"""`QuantLinear`: a linear layer built from a recipe and run by a backend; `RangedLinear`: one for each range of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends.activations import activate
from ditbench.harness.backends.base import AUTO, FusedKernel, choose
from ditbench.harness.backends.few_rows import linear
from ditbench.harness.backends.rotations import transformed
from ditbench.harness.build.pending import Pending, put_off_linear
from ditbench.harness.build.treatment import Treatment
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.transforms import Transform


class QuantLinear(nn.Module):
    """y = activation(kernel(transform(x)) + low-rank branch + bias), in the dtype of x.

    Args:
        recipe: of the layer.
        effective: weight (O, C) and bias table after transforms and folds, before rounding.
        folded: the transform's shift and scale live in the producer; only its rotations run here.
        clock: the denoising step, shared by all layers of the model.
        dtype: of the float parts (bias, float weight, low-rank branch).
    """

    down_rC: Tensor
    up_Or: Tensor
    treatment: Treatment | None = None  # shared with the layers that treat their input alike: `share_inputs`

    def __init__(
        self,
        recipe: LayerRecipe,
        effective: EffectiveLinear,
        *,
        folded: bool,
        clock: StepClock,
        dtype: torch.dtype,
        device: torch.device,
        backend: str = AUTO,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = effective.weight_OC.shape
        self.clock = clock
        online = recipe.transform.rotations_only() if folded else recipe.transform
        precision = torch.promote_types(dtype, torch.float32)
        self.transform: Transform | None = None if online.is_identity else copy.deepcopy(online).to(precision)
        chosen = choose(recipe, device, backend)
        self.backend, self.kind = chosen.NAME, chosen.KIND
        self.weight_spec = recipe.weight.spec if recipe.weight else None
        self.act_spec = recipe.act.spec if recipe.act else None
        self.rounds = recipe.weight is not None or recipe.act is not None
        self.kernel = chosen.make_kernel(recipe, effective.weight_OC.to(dtype))
        self.bias: StepTable | None = None if effective.bias is None else effective.bias.map(self._held_bias(dtype))
        if recipe.low_rank is not None:
            self.register_buffer("down_rC", recipe.low_rank.down_rC.to(dtype))
            self.register_buffer("up_Or", recipe.low_rank.up_Or.to(dtype))
        self.has_low_rank = recipe.low_rank is not None

    def forward(self, x: Tensor, activation: str | None = None, at_once: bool = False) -> Tensor:
        """activation: of `backends/activations.py`, applied before the cast. Between the products of a block (`pending.py`) the call is put
        off, unless it is wanted at_once, until somebody reads its result, or an activation that it can end in.
        """
        if activation is None and not at_once:
            put_off = put_off_linear(x, self.out_features, partial(self._again, x))
            if put_off is not None:
                return put_off
        step, rows = self.clock.step, None
        is_fused = isinstance(self.kernel, FusedKernel)
        if isinstance(x, Pending):
            kernel = self.kernel if is_fused and self.transform is None else None
            x, rows = x.handed_to(kernel, step, self.treatment, keep=self.has_low_rank)
        dtype = x.dtype
        if isinstance(self.kernel, FusedKernel):
            low_rank = (self.down_rC, self.up_Or) if self.has_low_rank else None
            return self._fused(self.kernel, x, step, low_rank, activation, rows)
        if self.transform is not None:
            x = transformed(self.transform, x, step)
        y = self.kernel(x, step)
        if self.has_low_rank:
            y = y + linear(linear(x.to(self.down_rC.dtype), self.down_rC), self.up_Or)
        if self.bias is not None:
            y += self.bias.at(step)
        return activate(y, activation).to(dtype)

    def _held_bias(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda bias: bias.to(dtype).to(self.kernel.bias_dtype or dtype)

    def _again(self, x: Tensor, activation: str | None) -> Tensor:
        return self.forward(x, activation, at_once=True)

    def _fused(
        self,
        kernel: FusedKernel,
        x: Tensor,
        step: Tensor | None,
        low_rank: tuple[Tensor, Tensor] | None,
        activation: str | None,
        rows: Any,
    ) -> Tensor:
        """rows: what the kernel makes of x, if that is known."""
        keep = low_rank is not None
        more: dict[str, Any] = {}
        if rows is not None:
            more["rows"] = rows
        elif self.treatment is not None:
            make = partial(kernel.rows, x, step, self.transform, keep=keep)
            more["rows"] = self.treatment.of(x, step, keep, make)
        if activation in kernel.activations:
            more["activation"], activation = activation, None
        y = kernel.layer(x, step, self.transform, low_rank, self.bias, **more)
        return activate(y, activation).to(x.dtype)


class RangedLinear(nn.Module):
    """A layer whose recipe changes with the range of denoising steps: the QuantLinear of the clock's range runs.

    variant_of_range: the place in `variants` of what runs in each range. Buffers that are equal in several variants, such as
    codes under two activation formats, are held once (where the backends lay them out alike).
    """

    def __init__(self, variants: Sequence[QuantLinear], variant_of_range: Sequence[int]) -> None:
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.variant_of_range = tuple(variant_of_range)
        self.clock = variants[0].clock
        self._hold_once()

    def of_range(self, index: int) -> QuantLinear:
        return self.variants[self.variant_of_range[index]]  # type: ignore[return-value]

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return self.of_range(self.clock.range)(x, activation)

    def _hold_once(self) -> None:
        kept: dict[str, list[Tensor]] = {}
        for variant in self.variants:
            for path, module in variant.named_modules():
                for name, tensor in module._buffers.items():
                    if tensor is not None:
                        known = kept.setdefault(f"{path}.{name}", [])
                        equal = [t for t in known if t.dtype == tensor.dtype and torch.equal(t, tensor)]
                        module._buffers[name] = equal[0] if equal else tensor
                        known += [] if equal else [tensor]


class QuantPatchEmbed(nn.Module):
    """A patch embedding (Conv2d with stride = kernel) as a QuantLinear on flattened patches."""

    def __init__(self, conv: nn.Conv2d, linear: QuantLinear | RangedLinear) -> None:
        super().__init__()
        if conv.stride != conv.kernel_size or conv.padding != (0, 0) or conv.groups != 1:
            raise ValueError(f"only patch embeddings (stride = kernel, no padding) can be quantized, got {conv}")
        self.kernel_size, self.linear = conv.kernel_size, linear

    def patches(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_size, stride=self.kernel_size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2] // self.kernel_size[0], x.shape[-1] // self.kernel_size[1]
        return self.linear(self.patches(x)).transpose(1, 2).unflatten(2, (height, width))
