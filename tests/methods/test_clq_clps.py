"""CLQ's cross-layer parameter search: the target behind, and the ends it chooses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from clq_cases import BLOCK, BOTH, BOTH_STATIC, FAST, LAST
from torch import nn

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.models.calls import Call
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.quant.target import Site, Target
from ditbench.methods import clq
from ditbench.methods.clq import Params, Quantizer, loudest, search


def chain(normal, *, blocks: int = 2):
    """Blocks of two linears with a nonlinearity, small enough for loops: (target, calibration-like stream inputs)."""

    class Block(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            for place, linear in enumerate((self.one, self.two)):
                linear.weight = nn.Parameter(normal(4, 4, seed=10 * seed + place).float(), requires_grad=False)
                linear.bias = nn.Parameter(normal(4, seed=10 * seed + 5 + place).float(), requires_grad=False)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(seed + 1) for seed in range(blocks))
            self.clock = StepClock(None)
            self.dtype_of_inputs = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(sample=x)

    names = tuple(f"blocks.{b}.{n}" for b in range(blocks) for n in ("one", "two"))
    target = Target(
        Chain(), names, tuple(Site(f"{n}.in", (n,)) for n in names), blocks=tuple(f"blocks.{b}" for b in range(blocks))
    )
    steps = [normal(3, 5, 4, seed=70 + s).float() for s in range(2)]
    calibration = Calibration(tuple((Call({"x": x}),) for x in steps), key="chain")
    return target, calibration, torch.cat(steps).double()


def looped_rounding(weight, low_ratio, high_ratio):
    """Asymmetric, 3 bits, row by row, value by value; zero inside the range."""
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        low = min(low_ratio * min(weight[row].tolist()), 0.0)
        high = max(high_ratio * max(weight[row].tolist()), 0.0)
        scale = (high - low) / 7
        zero = round(-low / scale)
        for column in range(weight.shape[1]):
            code = min(max(round(float(weight[row, column]) / scale) + zero, 0), 7)
            rounded[row, column] = (code - zero) * scale
    return rounded


@pytest.mark.parametrize("choose", ["variance", "peak"])
def test_the_search_is_the_papers_equations_written_out(choose, normal):
    """Slow, float64, away from the defaults: K = 8, Δ = {.5, .8, 1}, reach 1; weights of 3 bits, activations in float."""
    target, calibration, x = chain(normal, blocks=3)
    bits = Bits(QuantSpec(3, "per_channel", symmetric=False), None)
    params = Params(
        parts="cbc+clps", probe=(0.5, 0.8, 1.0), choose=choose, reach=1, grid=8, lowest=0.3, local=2,
        search_samples=9, search_steps=9,
    )  # fmt: skip
    state = clq.fit(target, calibration, bits, params)

    weights = {n: target.module(n).weight.double() for n in target.layers}
    bias = {n: target.module(n).bias.double() for n in target.layers}

    def outputs(hidden, first, weights):
        found = {}
        for block in range(first, min(first + 2, 3)):
            one = found[f"blocks.{block}.one"] = hidden @ weights[f"blocks.{block}.one"].T + bias[f"blocks.{block}.one"]
            hidden = one.clamp(min=0) @ weights[f"blocks.{block}.two"].T + bias[f"blocks.{block}.two"]
            found[f"blocks.{block}.two"] = hidden
        return found

    shares = [1 - i / 8 for i in range(6)]
    hidden, goals = x, []
    for block in range(3):
        exact = outputs(hidden, block, weights)
        chosen = {}
        for name in (f"blocks.{block}.one", f"blocks.{block}.two"):
            after = list(exact)[list(exact).index(name) + 1 :]
            goal, best = name, -1.0
            for other in after:
                errors = []
                for share in params.probe:
                    rounded = outputs(hidden, block, weights | {name: looped_rounding(weights[name], share, share)})
                    error = sum(abs(float(v)) for v in (rounded[other] - exact[other]).flatten())
                    errors.append(error / sum(abs(float(v)) for v in exact[other].flatten()))
                mean = sum(errors) / 3
                judged = sum((e - mean) ** 2 for e in errors) / 3 if choose == "variance" else mean
                if judged > best:
                    goal, best = other, judged
            goals.append(goal)

            def loss(i, j, name=name, goal=goal, hidden=hidden, block=block, exact=exact):
                changed = weights | {name: looped_rounding(weights[name], shares[i], shares[j])}
                return float(((outputs(hidden, block, changed)[goal] - exact[goal]) ** 2).sum())

            pair = min(range(6), key=lambda i: loss(i, i))
            pair, before = (pair, pair), None
            while pair != before:
                before = pair
                near = [(i, j) for i in range(6) for j in range(6) if max(abs(i - pair[0]), abs(j - pair[1])) <= 2]
                pair = min(near, key=lambda p: loss(*p))
            chosen[name] = shares[pair[0]], shares[pair[1]]
            assert state[f"{name}/weight_ratios"].tolist() == pytest.approx(chosen[name])
        final = weights | {n: looped_rounding(weights[n], *ends) for n, ends in chosen.items()}
        hidden = outputs(hidden, block, final)[f"blocks.{block}.two"]
    found = [state[f"{n}/weight_ratios"].tolist() for n in target.layers]
    assert any(low != high for low, high in found) and goals[-1] == "blocks.2.two"
    assert any(goal.split(".")[1] != name.split(".")[1] for goal, name in zip(goals, target.layers, strict=True))


def searching(target, calibration, bits, params, block, monkeypatch):
    """The search of one block as fit sets it up."""
    found = []

    class Kept(clq.CrossLayerSearch):
        def __init__(self, *args):
            super().__init__(*args)
            if self.block == block:
                found.append(self)
                raise StopIteration

    with monkeypatch.context() as patch:
        patch.setattr(clq, "CrossLayerSearch", Kept)
        with pytest.raises((StopIteration, RuntimeError)):
            clq.fit(target, calibration, bits, params)
    return found[0]


@pytest.mark.parametrize("bits", [BOTH, BOTH_STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("where", ["fp_block", "fp_network"])
def test_what_is_found_is_never_worse_than_the_full_range(bits, where, small_target, small_calibration, monkeypatch):
    params = replace(FAST, target=where)
    one = searching(small_target, small_calibration, bits, params, LAST, monkeypatch)
    sites = [s for s in small_target.sites if s.name.startswith(LAST)]
    for quantizer in clq.quantizers(sites, one.layers, bits)[:4]:
        goal = one.goal(quantizer)
        tried = {}

        def loss(low, high, quantizer=quantizer, goal=goal, tried=tried):
            output = one.outputs(quantizer, low, high, [goal])[goal]
            tried[low, high] = float((output - one.expected[goal]).double().square().sum())
            return tried[low, high]

        ends = search(loss, params, one_ratio=quantizer.one_ratio)
        assert tried[ends] == min(tried.values()) <= tried[1.0, 1.0]
        assert max(tried.values()) > tried[ends]
        found = one.ends(quantizer)
        assert all(torch.equal(value, found[key]) for key, value in quantizer.ends(*ends, one.found).items())


def test_the_target_lies_behind_within_three_blocks_and_falls_back_to_the_layer_itself(five_blocks, monkeypatch):
    target, calibration = five_blocks
    for block, reachable in ((target.blocks[0], target.blocks[:4]), (target.blocks[4], target.blocks[4:])):
        one = searching(target, calibration, BOTH, FAST, block, monkeypatch)
        assert list(one.expected) == [n for b in reachable for n in target.layers_in(b)]
        sites = [s for s in target.sites if s.name.startswith(f"{block}.")]
        for quantizer in clq.quantizers(sites, one.layers, BOTH):
            goal, own = one.goal(quantizer), quantizer.layers[-1]
            if own == f"{target.blocks[4]}.ff.net.2":
                assert goal == own
            else:
                assert target.layers.index(goal) > target.layers.index(own)


def test_the_target_is_of_the_largest_variance_or_of_the_largest_error():
    errors = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.8, 0.4], [0.1, 0.9, 0.4]], dtype=torch.float64)
    assert (loudest(errors, "variance"), loudest(errors, "peak")) == (0, 1)


def test_a_later_layers_reference_is_the_float_blocks_or_the_float_networks(five_blocks, monkeypatch):
    target, calibration = five_blocks
    last = target.blocks[4]
    layer = f"{last}.ff.net.2"
    plain = float_copy(target, dtype=torch.float32)
    kept = []
    plain.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2].flatten(0, -2)))
    with torch.no_grad():
        for _, inputs in calibration.batches():
            plain(**inputs)
    block, network = (
        searching(target, calibration, BOTH, replace(FAST, target=t), last, monkeypatch).expected[layer]
        for t in ("fp_block", "fp_network")
    )
    torch.testing.assert_close(network, torch.cat(kept), rtol=1e-4, atol=1e-4)
    assert relative_error(block, network) > 1e-3


def test_everything_but_the_quantizer_under_search_is_in_float(small_target, small_calibration, monkeypatch):
    one = searching(small_target, small_calibration, BOTH, FAST, BLOCK, monkeypatch)
    name = f"{BLOCK}.attn1.to_out.0"
    at_16_bits = one.stream.layer_outputs(BLOCK, 3, one.calls, list(one.expected))
    for quantizer in (Quantizer("weight", (name,), BOTH.weight), Quantizer("act", (name,), BOTH.act)):
        rounded = one.outputs(quantizer, 0.6, 0.6, [f"{BLOCK}.attn1.to_v", name])
        assert torch.equal(rounded[f"{BLOCK}.attn1.to_v"], at_16_bits[f"{BLOCK}.attn1.to_v"])
        assert not torch.equal(rounded[name], at_16_bits[name])
        kernel = one.layers[name].kernel
        again = one.stream.layer_outputs(BLOCK, 3, one.calls, [name])
        assert kernel.act is None and torch.equal(again[name], at_16_bits[name])
    sides = []
    monkeypatch.setattr(clq, "round_layer", lambda t, layer, state, bits, params, n: sides.append(bits))
    for side in ("weight", "act"):
        one.outputs(Quantizer(side, (name,), getattr(BOTH, side)), 0.6, 0.6, [name])
    assert sides == [replace(BOTH, act=None), replace(BOTH, weight=None)]


def test_the_grid_stops_at_its_lowest_share_and_both_ends_move_only_around_the_best():
    tried = []

    def loss(low, high):
        tried.append((low, high))
        return (low - 0.65) ** 2 + (high - 0.75) ** 2

    params = Params(grid=20, lowest=0.5, local=2)
    assert search(loss, params, one_ratio=False) == pytest.approx((0.65, 0.75))
    assert min(low for low, _ in tried) == pytest.approx(0.5) and (1.0, 1.0) in tried
    assert len(tried) < 11 * 11 and len(set(tried)) == len(tried)
    tried.clear()
    assert search(loss, params, one_ratio=True) == pytest.approx((0.7, 0.7))
    assert len(tried) == 11 and all(low == high for low, high in tried)


@pytest.mark.parametrize(("grid", "lowest", "local"), [(20, 0.4, 4), (40, 0.1, 4)])
def test_the_least_of_the_whole_grid_is_found_where_the_loss_is_a_quadratic_of_the_ends(grid, lowest, local):
    """Tilted and stretched ones too, whose best pair lies far from the diagonal; with a part of the grid's evaluations."""
    draw = torch.Generator().manual_seed(0)
    shares = [1 - i / grid for i in range(grid) if 1 - i / grid >= lowest - 1e-9]
    tried = 0
    for _ in range(200):
        root = torch.randn(2, 2, generator=draw, dtype=torch.float64)
        curvature = root @ root.T + 0.05 * torch.eye(2, dtype=torch.float64)
        best = torch.rand(2, generator=draw, dtype=torch.float64) * 0.9 + 0.2

        def loss(low, high, curvature=curvature, best=best):
            nonlocal tried
            tried += 1
            off = torch.tensor([low, high], dtype=torch.float64) - best
            return float(off @ curvature @ off)

        found = loss(*search(loss, Params(grid=grid, lowest=lowest, local=local), one_ratio=False))
        low_L, high_L = (torch.tensor(shares, dtype=torch.float64) - each for each in best)
        a, b, c = (float(curvature[at]) for at in ((0, 0), (0, 1), (1, 1)))
        everywhere = a * low_L[:, None] ** 2 + 2 * b * low_L[:, None] * high_L + c * high_L**2
        assert found <= float(everywhere.min()) + 1e-12
    assert tried < 200 * 0.5 * len(shares) ** 2 and Params().local == 4


def test_a_full_range_wins_a_tie():
    assert search(lambda low, high: 0.0, Params(), one_ratio=False) == (1.0, 1.0)
