from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU, LinearActivation
from diffusers.models.attention_processor import Attention
from torch import nn

from ditbench.harness.backends import vnni
from ditbench.harness.backends.activations import SILU
from ditbench.harness.backends.attention import lacks
from ditbench.harness.build import fusion
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec

WEIGHT, ACT = QuantSpec(8, "per_channel"), QuantSpec(8, "per_token", dynamic=True)
needs_kernel = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))


def quantized(model, backend: str = "auto", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    target = model.target()
    layers = {
        n: LayerRecipe(weight=quantize_weight(target.weight(n), WEIGHT), act=ActQuant(ACT)) for n in target.layers
    }
    return build(target, ModelRecipe(layers), dtype=dtype, backend=backend)


def attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """The shapes of the queries that came to our attention."""
    found: list[torch.Size] = []

    def noted(query, *args, **kwargs):
        found.append(query.shape)
        return original(query, *args, **kwargs)

    original = fusion.attention
    monkeypatch.setattr(fusion, "attention", noted)
    return found


@needs_kernel
def test_a_quantized_model_runs_it_in_every_block_and_the_float_model_nowhere(small_model, calls):
    inputs = small_model.step_inputs(2, torch.device("cpu"))
    inputs = {n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    with torch.no_grad():
        float_copy(small_model.target(), dtype=torch.bfloat16)(**inputs)
        assert calls == []
        quantized(small_model)(**inputs)
    assert len(calls) == len(small_model.target().blocks)


@needs_kernel
def test_a_simulated_model_and_a_real_one_give_the_same_bits(small_model):
    """Both run it, so that parity is of the layers alone."""
    inputs = small_model.step_inputs(3, torch.device("cpu"))
    inputs = {n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    with torch.no_grad():
        real, simulated = (quantized(small_model, backend)(**inputs).sample for backend in ("vnni", "simulate"))
    assert torch.equal(real, simulated)


@needs_kernel
def test_outside_of_attention_modules_the_name_means_torchs(small_model, calls):
    module = attentions(quantized(small_model))[0]
    x = torch.randn(1, 16, 48).bfloat16()
    with torch.no_grad():
        module(x)
        q = x.unflatten(-1, (2, 24)).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1


@needs_kernel
@pytest.mark.parametrize(
    "differs", ["text", "mask", "norm_q", "norm_cross", "residual_connection", "rescale_output_factor"]
)
def test_it_does_what_diffusers_processor_does(differs):
    torch.manual_seed(0)
    settings = {"cross_attention_dim": 32} if differs in ("text", "norm_cross") else {}
    settings |= {"cross_attention_norm": "layer_norm"} if differs == "norm_cross" else {}
    theirs = Attention(48, heads=2, dim_head=24, **settings).bfloat16().eval()
    if differs == "norm_q":
        theirs.norm_q = nn.LayerNorm(24).bfloat16()
    elif hasattr(theirs, differs) and differs != "norm_cross":
        setattr(theirs, differs, 2)
    ours = copy.deepcopy(theirs)
    fusion.fuse_attention(ours)
    given = {"encoder_hidden_states": torch.randn(1, 7, 32).bfloat16()} if settings else {}
    if differs == "mask":
        given["attention_mask"] = torch.zeros(1, 1, 16).index_fill(2, torch.arange(9, 16), -1e4).bfloat16()
    x = torch.randn(1, 16, 48).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, **given), theirs(x, **given), rtol=2**-6, atol=4e-3)


class Other(nn.Module):
    """An attention module of a family's own: other arguments, and given by name."""

    processor = None

    def set_processor(self, processor) -> None: ...

    def forward(self, hidden_states, text, mask, rotary) -> torch.Tensor:
        return F.scaled_dot_product_attention(hidden_states, text, rotary)


@needs_kernel
def test_attention_modules_of_other_classes_are_called_as_they_are(calls):
    module, x = Other(), torch.randn(1, 2, 16, 24).bfloat16()
    fusion.fuse_attention(module)
    assert torch.equal(module(x, x, None, x), module(hidden_states=x, text=x, mask=None, rotary=x))
    assert len(calls) == 2


@needs_kernel
def test_it_is_still_an_attention_module_and_a_copy_is_whole(small_model):
    module = attentions(quantized(small_model))[0]
    copied, x = copy.deepcopy(module), torch.randn(1, 16, 48).bfloat16()
    with torch.no_grad():
        assert torch.equal(copied(x), module(x))
        copied.to_q = copied.to_k
        assert not torch.equal(copied(x), module(x))


@needs_kernel
def test_what_was_pickled_computes_the_same(small_model):
    model = quantized(small_model)
    again = pickle.loads(pickle.dumps(model))
    inputs = small_model.step_inputs(2, torch.device("cpu"))
    inputs = {n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    assert all(type(one) is type(other) for one, other in zip(attentions(again), attentions(model), strict=True))


@needs_kernel
def test_it_compiles_without_a_graph_break(small_model):
    module, x = attentions(quantized(small_model))[0], torch.randn(2, 16, 48).bfloat16()
    with torch.no_grad():
        run = torch.compile(lambda x: module(x), backend="aot_eager", fullgraph=True)
        assert torch.equal(run(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_other_dtypes_nothing_changes(small_model, dtype):
    assert all(type(module) is Attention for module in attentions(quantized(small_model, "simulate", dtype)))


def test_a_machine_without_the_kernel_keeps_torchs(small_model, monkeypatch):
    monkeypatch.setattr(fusion, "lacks", lambda: "not here")
    assert all(type(module) is Attention for module in attentions(quantized(small_model, "simulate")))


def feed_forward(small_model) -> nn.Module:
    return quantized(small_model).transformer_blocks[0].ff.net[0]


needs_vnni = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))


@needs_vnni
def test_a_gelu_behind_a_quantized_layer_is_the_end_of_its_product(small_model):
    """Of its float32 sum, so that nothing is rounded between the two."""
    module, x = feed_forward(small_model), torch.randn(1, 16, 48).bfloat16()
    with torch.no_grad():
        y, plain = module(x), module.proj(x.float())
    torch.testing.assert_close(y.float(), F.gelu(plain, approximate="tanh"), rtol=2**-8, atol=1e-6)


@needs_vnni
def test_an_activation_behind_a_float_layer_stays_torchs(small_model):
    target = small_model.target()
    kept = [name for name in target.layers if ".ff.net.0" not in name]
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), WEIGHT), act=ActQuant(ACT)) for n in kept}
    assert type(build(target, ModelRecipe(layers)).transformer_blocks[0].ff.net[0]) is GELU


@needs_vnni
def test_a_gelu_with_erf_is_the_end_of_its_product_too(small_model):
    module, x = feed_forward(small_model), torch.randn(1, 16, 48).bfloat16()
    module.__class__, module.approximate = GELU, "none"
    fusion.fuse_activations(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x).float(), F.gelu(module.proj(x.float())), rtol=2**-8, atol=1e-6)


@needs_vnni
@pytest.mark.parametrize("sort", ["gelu", "silu"])
def test_a_block_compiles_without_a_graph_break(small_model, sort):
    module, x = feed_forward(small_model), torch.randn(2, 16, 48).bfloat16()
    if sort == "silu":
        silu = LinearActivation(8, 8)
        silu.proj = module.proj
        fusion.fuse_activations(silu)
        assert type(silu) is fusion.ending_in(LinearActivation, SILU)
        module = silu
    with torch.no_grad():
        run = torch.compile(lambda x: module(x), backend="aot_eager", fullgraph=True)
        assert torch.equal(run(x), module(x))


def test_patches_are_embedded_to_the_same_bits_with_the_channels_of_a_token_side_by_side(small_model):
    plain, built = float_copy(small_model.target(), dtype=torch.bfloat16), quantized(small_model)
    x = torch.randn(2, plain.pos_embed.proj.in_channels, 8, 8).bfloat16()
    with torch.no_grad():
        theirs, ours = plain.pos_embed.proj(x), built.pos_embed.proj(x)
    assert torch.equal(ours, theirs) and ours.flatten(2).transpose(1, 2).is_contiguous()
    assert not theirs.flatten(2).transpose(1, 2).is_contiguous()
    assert type(copy.deepcopy(built.pos_embed.proj)) is type(pickle.loads(pickle.dumps(built)).pos_embed.proj)
