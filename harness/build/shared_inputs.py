"""Layers that read one tensor (q, k and v; gate and up) transform and quantize it once.

Which layers read the same tensor is seen when they are called: what was made of a tensor is left on it, for layers that make
the same of it, and goes with it. So this holds for every family, and for exports, without a word about them; a layer whose
transform or quantizer is its own shares nothing. While a model is compiled nothing is shared.
"""

from __future__ import annotations

from torch import nn

from ditbench.harness.backends.alike import alike
from ditbench.harness.backends.base import FusedKernel
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.treatment import Treatment


def share_inputs(model: nn.Module) -> None:
    """Give the layers that stand side by side in a module of the model, and treat their inputs alike, one treatment."""
    for parent in model.modules():
        groups: list[list[QuantLinear]] = []
        for layer in parent.children():
            if isinstance(layer, QuantLinear) and isinstance(layer.kernel, FusedKernel):
                group = next((group for group in groups if treat_alike(group[0], layer)), None)
                if group is None:
                    groups.append([layer])
                else:
                    group.append(layer)
        for group in groups:
            if len(group) > 1:
                treatment = Treatment()
                for layer in group:
                    layer.treatment = treatment


def treat_alike(a: QuantLinear, b: QuantLinear) -> bool:
    """Two layers on fused kernels."""
    assert isinstance(a.kernel, FusedKernel) and isinstance(b.kernel, FusedKernel)
    return a.in_features == b.in_features and a.kernel.rows_like(b.kernel) and alike(a.transform, b.transform)
