import torch

from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.transforms import Hadamard, Transform

SITE = "transformer_blocks.0.attn_in"  # its producer is known: adaLN rows


def test_only_a_shift_or_a_scale_is_folded_and_layers_in_float_follow_it(small_model):
    target = small_model.target(skip=["to_k"])
    turned, scaled = Transform(rotations=(Hadamard(48),)), Transform(scale_C=torch.full((48,), 2.0))
    for transform, fold, folded in ((turned, True, set()), (scaled, True, {SITE}), (scaled, False, set())):
        transforms, found = place(target, {SITE: transform}, fold=fold)
        assert found == folded
        readers = {name.rpartition(".")[2] for name in transforms}
        assert readers == ({"to_q", "to_k", "to_v"} if folded else {"to_q", "to_v"})


def test_an_identity_is_left_out(small_target):
    assert place(small_target, {SITE: Transform()}) == ({}, frozenset())
