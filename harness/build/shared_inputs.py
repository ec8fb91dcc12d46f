"""Layers that read one tensor (q, k and v; gate and up) transform and quantize it once.

Which layers read the same tensor is seen when they are called: what was made of a tensor is left on it, for layers that make
the same of it, and goes with it. So this holds for every family, and for exports, without a word about them; a layer whose
transform or quantizer is its own shares nothing. While a model is compiled nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ditbench.harness.backends.alike import alike
from ditbench.harness.backends.base import FusedKernel
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.treatment import Treatment


def share_inputs(model: nn.Module) -> None:
    """Give layers that treat their inputs alike one treatment: those side by side in a module of the model, and those of the
    modules beside them (FLUX's proj_mlp stands beside the attention, and reads what its q, k and v read).
    """
    for parent in model.modules():
        ours = list(_layers(parent))
        beside = [child for child in parent.children() if not isinstance(child, nn.ModuleList)] if ours else []
        inside = [layer for child in beside for layer in _layers(child)]
        groups: list[list[QuantLinear]] = []
        for layer in ours + inside:
            group = next((group for group in groups if treat_alike(group[0], layer)), None)
            if group is not None:
                group.append(layer)
            elif layer in ours:
                groups.append([layer])
        for group in groups:
            if len(group) > 1:
                treatment = next((layer.treatment for layer in group if layer.treatment), None) or Treatment()
                for layer in group:
                    layer.treatment = treatment


def _layers(parent: nn.Module) -> Iterator[QuantLinear]:
    """Its own, on fused kernels."""
    for layer in parent.children():
        if isinstance(layer, QuantLinear) and isinstance(layer.kernel, FusedKernel):
            yield layer


def treat_alike(a: QuantLinear, b: QuantLinear) -> bool:
    """Two layers on fused kernels."""
    assert isinstance(a.kernel, FusedKernel) and isinstance(b.kernel, FusedKernel)
    return a.in_features == b.in_features and a.kernel.rows_like(b.kernel) and alike(a.transform, b.transform)
