"""What a quantized block of any family computes between its products, by our kernels."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import MADE, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditbench.harness.backends import simulate, vnni, vnni_extension
from ditbench.harness.build import blocks, fusion, rotary
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.build.flat_calls import relative_error
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.pending import Between, Pending, settled
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepClock

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
ACT = ActQuant(QuantSpec(8, "per_token", dynamic=True))
FAMILIES = sorted(set(MADE) - {"hunyuan_dit"})  # whose timestep's embedding is cast by its pipeline only
# What runs in one call of the small model: norms that hand over codes, sums with a gate, rotary positions.
RUNS = {"flux": (10, 10, 8), "sd3": (12, 11, 0), "wan": (6, 4, 4)}


def quantized(model: LoadedModel, backend: str = "auto") -> nn.Module:
    target, weight = model.target(), QuantSpec(8, "per_channel")
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), weight), act=ACT) for n in target.layers}
    return build(target, ModelRecipe(layers), backend=backend)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == vnni_extension.LIBRARY:
            self.runs[func._opname] += 1
        return func(*args, **(kwargs or {}))


def predicted(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        returned = model(**inputs)
    found = returned if isinstance(returned, Tensor) else returned[0]
    return torch.cat([x.flatten() for x in found]) if isinstance(found, list) else found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_bits_simulated_and_about_the_error_of_torch_s_own(name, monkeypatch):
    model = small_model(name)
    given = model.step_inputs(2)
    inputs = placed(given, torch.bfloat16, torch.device("cpu"))
    with Counted() as counted:
        real = predicted(quantized(model), inputs)
    assert torch.equal(real, predicted(quantized(model, simulate.NAME), inputs))
    monkeypatch.setattr(fusion, "fuse_blocks", lambda model: None)
    monkeypatch.setattr(fusion, "fuse_rotary", lambda model: None)
    theirs = predicted(quantized(model), inputs)
    expected = predicted(
        float_copy(model.target(), dtype=torch.float32), placed(given, torch.float32, torch.device("cpu"))
    )
    if name in RUNS:
        assert tuple(counted.runs[kernel] for kernel in ("normed_rows", "gated", "rotary")) == RUNS[name]
    assert relative_error(real.float(), expected) < 1.25 * relative_error(theirs.float(), expected) + 1e-4


@pytest.mark.parametrize("width", [48, 33, 1152])
@pytest.mark.parametrize("centred", [True, False])
def test_norms_with_and_without_a_weight_are_exact_to_one_rounding(width, centred):
    x = drawn(2, 5, width) * 3 + 1
    weight, bias = drawn(1, width, seed=1).float(), drawn(2, width, seed=2).float()
    exact = F.layer_norm(x.double(), (width,), eps=1e-6) if centred else F.rms_norm(x.double(), (width,), eps=1e-6)
    for factor, shift in ((None, None), (weight, None), (weight, bias)):
        expected = exact if factor is None else exact * factor.double()[:, None]
        expected = expected if shift is None else expected + shift.double()[:, None]
        found = torch.ops.ditbench_vnni.normed(x, factor, shift, 1e-6, centred)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("width", [128, 72, 10])
def test_rotary_positions_are_diffusers_own(width):
    from diffusers.models.embeddings import apply_rotary_emb

    x, tables = drawn(2, 5, 3, width), (drawn(5, width, seed=1).float(), drawn(5, width, seed=2).float())
    expected = apply_rotary_emb(x.double(), tables, sequence_dim=1)
    torch.testing.assert_close(rotary.rotated(x, *tables).double(), expected, rtol=2**-8, atol=1e-6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


X, Y, ROW = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(2, 1, 16, seed=2)
WEIGHT, BIAS = drawn(16, seed=3), drawn(16, seed=4)
WORDS = {
    "modulated": lambda: F.layer_norm(X, (16,), eps=1e-6) * (1 + ROW) + ROW,
    "in float32 and back": lambda: (F.layer_norm(X.float(), (16,)) * (1 + ROW.float()) + ROW).to(torch.bfloat16),
    "with weight and bias": lambda: F.layer_norm(X, (16,), WEIGHT, BIAS) * (1 + ROW) + ROW,
    "affine in float32": lambda: F.layer_norm(X.float(), (16,), WEIGHT.float(), BIAS.float()).type_as(X),
    "root mean square": lambda: F.rms_norm(X, (16,), WEIGHT, 1e-6) * ROW,
    "gate and residual": lambda: X + ROW * Y,
    "residual last": lambda: ROW * Y + X,
    "gate in float32": lambda: (X.float() + Y * ROW.float()).type_as(X),
    "by the names of the arguments": lambda: torch.add(torch.mul(F.layer_norm(X, (16,)), other=1 + ROW), other=ROW),
    # What no kernel computes.
    "no residual": lambda: ROW * Y,
    "per token": lambda: F.layer_norm(X, (16,)) * Y,
    "of a norm": lambda: X + F.layer_norm(Y, (16,)),
    "twice": lambda: X + ROW * Y + ROW * X,
    "stays in float32": lambda: F.layer_norm(X.float(), (16,)) * ROW,
    "a multiple": lambda: torch.add(F.layer_norm(X, (16,)) * ROW, ROW, alpha=2),
    "a number": lambda: F.layer_norm(X, (16,)) * 2 + 1,
    "into another tensor": lambda: torch.mul(F.layer_norm(X, (16,)), 1 + ROW, out=torch.empty_like(X)),
    "reads parts": lambda: torch.cat([F.layer_norm(X, (16,))[:, :2], Y[:, 2:] * ROW], dim=1),
}
KERNELS = list(WORDS)[:9]


@pytest.mark.parametrize("words", list(WORDS))
def test_what_is_put_off_is_what_was_asked_for(words):
    expected = WORDS[words]()
    with Between(), Counted() as counted:
        found = settled(WORDS[words]())
    assert type(found) is Tensor and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    if words in KERNELS:
        assert sum(counted.runs.values()) == 1


def test_a_cast_to_another_device_goes_there():
    with Between():
        found = settled((F.layer_norm(X.float(), (16,)) * ROW).type_as(X.to("meta")))
    assert found.device.type == "meta" and found.dtype == torch.bfloat16


def test_what_is_pending_answers_without_being_computed_and_counts_once():
    with Between(), Counted() as counted:
        found = F.layer_norm(X, (16,)) * ROW
        assert isinstance(found, Pending) and found.shape == X.shape and found.dtype == torch.bfloat16
        assert found.dim() == 3 and found.size(-1) == 16 and not counted.runs
        assert torch.equal(found + 0, found.clone()) and counted.runs == {"normed": 1}


def test_what_is_pending_is_of_the_values_that_it_was_told_and_not_of_what_they_became():
    x = X.clone()
    expected = settled(F.layer_norm(x, (16,)))
    with Between():
        found = F.layer_norm(x, (16,))
        x[:, 0].mul_(2)
        torch.testing.assert_close(settled(found), expected, rtol=2**-6, atol=2**-6)


def a_layer() -> QuantLinear:
    effective = EffectiveLinear(torch.empty(8, 16), None)
    recipe = LayerRecipe(weight=quantize_weight(drawn(8, 16).float(), QuantSpec(8, "per_channel")), act=ACT)
    settings = {"folded": False, "clock": StepClock(None), "dtype": torch.bfloat16, "device": torch.device("cpu")}
    return QuantLinear(recipe, effective, **settings)


def test_a_layer_that_is_put_off_reads_what_its_input_was_when_it_was_called():
    layer, x = a_layer(), X.clone()
    expected = layer(X)
    with torch.no_grad(), Between():
        found = layer(x)
        assert isinstance(found, Pending)
        x[:, 0].mul_(2)
        assert torch.equal(settled(found), expected)


def test_a_layer_that_is_put_off_reads_what_a_norm_was_before_it_was_changed():
    """In place, whether or not anybody had asked for the norm, and by a view."""
    layer, x = a_layer(), X.clone()
    with torch.no_grad():
        normed = settled(F.layer_norm(x, (16,)))
        expected = layer(normed)
        for change in (lambda y: y.mul_(5), lambda y: (y.sum(), y.mul_(5)), lambda y: y[:, 1:].mul_(5)):
            with Between():
                given = F.layer_norm(x, (16,))
                found = layer(given)
                change(given)
                torch.testing.assert_close(settled(found), expected, rtol=2**-5, atol=2**-5)
                assert (given.float() - normed.float()).abs().max() > 4


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_copies_and_what_was_pickled_are_whole(name):
    model = small_model(name)
    inputs = placed(model.step_inputs(2), torch.bfloat16, torch.device("cpu"))
    ours = quantized(model)
    expected = predicted(ours, inputs)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(predicted(again, inputs), expected)
    for block in blocks.blocks_of(ours):
        assert block.plain_kind is type(block).__mro__[1]


def test_a_model_in_float32_and_a_float_model_stay_diffusers():
    model = small_model("flux")
    target = model.target()
    layers = {
        n: LayerRecipe(weight=quantize_weight(target.weight(n), QuantSpec(8, "per_channel")), act=ACT)
        for n in target.layers
    }
    for plain in (build(target, ModelRecipe(layers), dtype=torch.float32), float_copy(target, dtype=torch.bfloat16)):
        for name in target.blocks:
            theirs, ours = target.transformer.get_submodule(name), plain.get_submodule(name)
            assert type(ours) is type(theirs) and type(ours.attn.processor) is type(theirs.attn.processor)
