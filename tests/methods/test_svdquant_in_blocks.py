"""SVDQuant on formats in blocks, as nunchaku has NVFP4 and INT4: the residual and the activations lie on their grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.lowrank import residual
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import bits_of
from ditbench.methods import svdquant

QUICK = svdquant.Params(rank=7, num_grids=2, sample_rows=64)


@pytest.mark.parametrize("label", ["nvfp4", "mxfp4", "int4_g64", "wnvfp4_afp8"])
def test_a_format_is_taken_as_it_is_and_of_all_only_integers_are_shifted(label, small_target, small_calibration):
    bits = bits_of(label)
    state = svdquant.fit(small_target, small_calibration, bits, QUICK)
    recipe = svdquant.apply(small_target, state, bits, QUICK)
    for name, layer in recipe.layers.items():
        unsigned = label == "int4_g64" and name.endswith("ff.net.2")
        assert layer.weight.spec == bits.weight and layer.low_rank is not None
        assert layer.act.spec == replace(bits.act, symmetric=not unsigned)
        assert (layer.transform.shift is not None) == unsigned
        transforms = {each: recipe.layers[each].transform for each in recipe.layers}
        weight_OC = effective_linear(small_target, name, transforms, frozenset()).weight_OC
        plain = quantize_weight(residual(weight_OC, layer.low_rank), bits.weight)
        assert torch.equal(layer.weight.dequantize(), plain.dequantize()), "what the branch leaves is rounded"
