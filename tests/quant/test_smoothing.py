import pytest
import torch

from ditbench.harness.quant.smoothing import place, smoothing_scale
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


@pytest.mark.parametrize("strength", [0.2, 0.5])
def test_the_factor_is_the_papers_with_a_floor_under_both_ranges_and_under_itself(strength):
    act_C, weight_C = torch.tensor([4.0, 0.0, 2.0, 1e-6]), torch.tensor([0.5, 3.0, 0.0, 1e7])
    found_C = smoothing_scale(act_C, weight_C, strength, floor=1e-3)
    expected = [4.0**strength / 0.5 ** (1 - strength), 1e-3**strength / 3.0 ** (1 - strength)]
    expected += [2.0**strength / 1e-3 ** (1 - strength), 1e-3]  # the last would be 1e-3^strength / 1e7^(1 − strength)
    assert found_C.tolist() == pytest.approx(expected)
