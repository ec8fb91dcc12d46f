"""Blocks on the Triton kernels, and what stands between their layers: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import small_models
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ON_DEVICE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
pytest.importorskip("triton", reason="the kernels need triton")

from ditbench.harness.backends import between, cuda_fp8, cuda_int8, simulate  # noqa: E402
from ditbench.harness.build.build import build, float_copy  # noqa: E402
from ditbench.harness.models.calls import placed  # noqa: E402
from ditbench.harness.quant.lowrank import LowRank  # noqa: E402
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight  # noqa: E402
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe  # noqa: E402
from ditbench.harness.quant.spec import QuantSpec  # noqa: E402

pytestmark = pytest.mark.gpu if ON_DEVICE else []
W8, A8 = QuantSpec(8, "per_channel"), ActQuant(QuantSpec(8, "per_token", dynamic=True))
WIDTH, TOKENS = 48, 16


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    """The backends take layers on any device, and what stands between these is theirs."""
    for backend in (cuda_int8, cuda_fp8):
        monkeypatch.setattr(backend, "unsupported", lambda recipe, device: None)
    monkeypatch.setitem(between.found, DEVICE.type, between.InTriton())


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ditbench":
            self.runs[func._opname] += 1
        return func(*args, **(kwargs or {}))


def quantized(model, backend: str = cuda_int8.NAME, spec: QuantSpec = W8, act: ActQuant = A8, rank: int = 0):
    target, layers = model.target(), {}
    for name in target.layers:
        weight_OC = target.weight(name)
        parts = LowRank(0.1 * drawn(rank, weight_OC.shape[1]), drawn(len(weight_OC), rank, seed=1)) if rank else None
        layers[name] = LayerRecipe(weight=quantize_weight(weight_OC, spec), act=act, low_rank=parts)
    return build(target, ModelRecipe(layers), backend=backend, device=DEVICE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def called(model: nn.Module, x: Tensor) -> Tensor:
    block, labels = model.transformer_blocks[0], torch.tensor([1, 2], device=DEVICE)
    return block(x, timestep=torch.tensor([3, 700], device=DEVICE), class_labels=labels)


def tokens() -> Tensor:
    return drawn(2, TOKENS, WIDTH).bfloat16().to(DEVICE)


def alike(found: Tensor, expected: Tensor) -> None:
    """The same bits in the interpreter; on a device torch may round a scale otherwise, and a code with it."""
    if ON_DEVICE:
        assert (found.float() - expected.float()).norm() < 2e-3 * expected.float().norm()
    else:
        assert torch.equal(found, expected)


def test_between_two_products_of_a_block_there_are_two_launches_and_a_simulated_block_gives_the_same_bits(small_model):
    """Norms hand over codes and no floats; left to quantize are the attention's output and the GELU's, which ends the product."""
    with torch.no_grad(), Counted() as counted:
        real = called(quantized(small_model), tokens())
    assert counted.runs == {"normed_rows": 2, "quantize_rows": 2, "int_product": 6, "gated": 2}
    with torch.no_grad(), Counted() as counted:
        simulated = called(quantized(small_model, simulate.NAME), tokens())
    assert counted.runs == {"normed": 2, "gated": 2, "activate": 1}
    alike(real, simulated)


@pytest.mark.usefixtures("e4m3_rows")
def test_a_block_of_e4m3_has_its_activation_behind_torch_s_product(small_model):
    e4m3 = replace(W8, number="e4m3"), ActQuant(replace(A8.spec, number="e4m3"))
    with torch.no_grad(), Counted() as counted:
        real = called(quantized(small_model, cuda_fp8.NAME, *e4m3), tokens())
        assert counted.runs == {"normed_rows": 2, "quantize_rows": 2, "gated": 2, "activate": 1}
        simulated = called(quantized(small_model, simulate.NAME, *e4m3), tokens())
    assert (real.float() - simulated.float()).norm() < 2**-6 * simulated.float().norm()


def test_a_block_computes_what_diffusers_does(small_model):
    x = tokens()
    exact = float_copy(small_model.target(), dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        expected, found = called(exact, x.double()), called(quantized(small_model), x)
    assert (found - expected).norm() < 0.004 * expected.norm()


def test_a_branch_gets_the_floats_beside_the_codes(small_model):
    with torch.no_grad():
        real, simulated = (
            called(quantized(small_model, backend, rank=2), tokens()) for backend in (cuda_int8.NAME, simulate.NAME)
        )
        without = called(quantized(small_model), tokens())
    assert (real.float() - simulated.float()).norm() < 2**-6 * simulated.float().norm()
    assert (real.float() - without.float()).norm() > 0.1 * without.float().norm()


def test_layers_that_quantize_a_norm_otherwise_get_codes_of_their_own(small_model):
    """k has 4 bits, between q and v, which have 8 and share theirs."""
    target, outputs = small_model.target(), []
    four = ActQuant(replace(A8.spec, bits=4))
    layers = {
        name: LayerRecipe(weight=quantize_weight(target.weight(name), W8), act=four if "to_k" in name else A8)
        for name in target.layers
    }
    for backend in (cuda_int8.NAME, simulate.NAME):
        model = build(target, ModelRecipe(layers), backend=backend, device=DEVICE)
        with torch.no_grad(), Counted() as counted:
            outputs.append(called(model, tokens()))
        assert counted.runs["normed_rows"] in (3, 0) and counted.runs["normed"] in (0, 2)
    alike(*outputs)


def test_what_a_hook_makes_of_a_norm_is_quantized_again(small_model):
    """Codes are of what the norm gave, and q, k and v read something else."""
    outputs = []
    for backend in (cuda_int8.NAME, simulate.NAME):
        model = quantized(small_model, backend)
        model.transformer_blocks[0].attn1.to_k.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
        with torch.no_grad():
            outputs.append(called(model, tokens()))
    alike(*outputs)


def test_q_k_and_v_share_the_codes_of_a_norm_in_inference_mode_too(small_model):
    model = quantized(small_model)
    with torch.no_grad():
        expected = called(model, tokens())
    with torch.inference_mode(), Counted() as counted:
        assert torch.equal(called(model, tokens()), expected)
    assert counted.runs["normed_rows"] == counted.runs["quantize_rows"] == 2


def test_a_compiled_block_is_one_graph_without_any_of_it_but_the_activation(small_model):
    model = quantized(small_model)
    block, x = model.transformer_blocks[0].ff, tokens()
    run = torch.compile(block, backend="inductor" if ON_DEVICE else "aot_eager", fullgraph=True)
    with torch.no_grad():
        alike(run(x), block(x))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_family_gives_the_same_bits_simulated(name):
    """FLUX: both kinds of blocks, text and image, norms of heads, positions."""
    model = small_models.small_model(name)
    inputs = placed(model.step_inputs(2), torch.bfloat16, DEVICE)
    outputs, runs = [], []
    for backend in (cuda_int8.NAME, simulate.NAME):
        with torch.no_grad(), Counted() as counted:
            outputs.append(quantized(model, backend)(**inputs)[0])
        runs.append(counted.runs)
    alike(*outputs)
    wanted = {"flux": ("normed_rows", "gated", "normed", "rotary"), "sd3": ("normed_rows", "gated")}[name]
    assert all(runs[0][kernel] > 1 for kernel in wanted) and runs[1]["quantize_rows"] == 0
