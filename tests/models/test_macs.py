"""Counting multiplications without touching a weight: the same numbers as a real call, for every family."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from small_pipelines import SIZES, SMALL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditbench.harness.models import macs as counting
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.known_families import family
from ditbench.harness.models.macs import count_macs, on_meta
from ditbench.harness.quant.target import QUANTIZABLE


def small(name: str) -> LoadedModel:
    torch.manual_seed(0)
    adapter = family(name)
    pipe = SMALL[name]()
    pipe.transformer.eval().requires_grad_(False)
    return LoadedModel(ModelSpec(name, name), pipe, replace(adapter, size=SIZES[name]) if name in SIZES else adapter)


def counted_for_real(transformer: nn.Module, inputs: dict) -> dict[str, int]:
    """By torch's own counter on a real call, with attention as two plain products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        transformer(**inputs)
    of_module = {name: sum(counts.values()) // 2 for name, counts in flops.get_flop_counts().items()}
    layers = [name for name, module in transformer.named_modules() if isinstance(module, QUANTIZABLE)]
    root = type(transformer).__name__
    return {name: of_module.get(f"{root}.{name}", 0) for name in layers} | {"": of_module["Global"]}


def attention_for_real(transformer: nn.Module, inputs: dict) -> dict[str, int]:
    """{module: both products of the attention that it calls}, from the shapes of a real call."""
    found: dict[str, int] = {}
    running: list[str] = []
    plain = F.scaled_dot_product_attention

    def noted(query, key, value, *args, **more):
        macs = query.numel() * key.shape[-2] + query[..., 0].numel() * value.shape[-2] * value.shape[-1]
        found[running[-1]] = found.get(running[-1], 0) + macs
        return plain(query, key, value, *args, **more)

    for name, module in transformer.named_modules():
        if any(True for _ in module.children()) and hasattr(module, "processor") or "ttention" in type(module).__name__:
            module.register_forward_pre_hook(lambda module, args, name=name: running.append(name))
            module.register_forward_hook(lambda module, args, output: running.pop() and None)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", noted)
        transformer(**inputs)
    return {name: macs for name, macs in found.items() if not name.endswith(".pooler")}  # one function of its weights


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_family_without_weights_counts_what_a_real_call_multiplies(name):
    """Frames and prompts that a family folds into the batch are all counted; attention by the module that calls it, too."""
    model = small(name)
    inputs = model.step_inputs(1)
    found, expected = count_macs(on_meta(model.transformer), inputs), counted_for_real(model.transformer, inputs)
    attention = {each: macs for each, macs in found.items() if each not in expected}
    assert found == expected | attention and attention == attention_for_real(model.transformer, inputs)


def test_macs_are_those_of_a_count_by_hand(small_model):
    """T = 16 tokens, C = 48, 2 blocks; the embedders of block 0 run once more for the last adaLN."""
    tokens, width = 16, 48
    macs = dict(small_model.macs)
    expected = {"pos_embed.proj": tokens * width * 4, "proj_out_1": width * 2 * width, "proj_out_2": tokens * width * 4}
    for block, calls in ((0, 2), (1, 1)):
        name = f"transformer_blocks.{block}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            expected[f"{name}.attn1.{layer}"] = tokens * width * width
        expected[f"{name}.ff.net.0.proj"] = expected[f"{name}.ff.net.2"] = tokens * width * 4 * width
        expected[f"{name}.norm1.linear"] = width * 6 * width
        expected[f"{name}.norm1.emb.timestep_embedder.linear_1"] = calls * 256 * width
        expected[f"{name}.norm1.emb.timestep_embedder.linear_2"] = calls * width * width
        expected[f"{name}.attn1"] = 2 * tokens * tokens * width  # q kᵀ and the map times v, all heads together
    total = macs.pop("")
    assert macs == expected
    assert total == sum(expected.values())


def test_all_rows_of_a_call_are_counted_and_no_hook_is_left(small_model):
    four = count_macs(small_model.transformer, small_model.step_inputs(4))
    assert four == {name: 4 * macs for name, macs in small_model.macs.items()}
    assert not any(module._forward_hooks for module in small_model.transformer.modules())


def test_a_model_is_counted_once(small_model, monkeypatch):
    model, calls = replace(small_model), []
    monkeypatch.setattr("ditbench.harness.models.base.count_macs", lambda *args: calls.append(args) or {"": 1})
    assert model.macs is model.macs and len(calls) == 1


def test_a_transformer_of_fourteen_billion_parameters_is_counted_from_shapes_alone():
    """Two of its 40 blocks at 1280×720, 81 frames: in float32 one attention map alone would take 914 GB."""
    width, hidden, tokens = 5120, 13824, 21 * 45 * 80
    with init_empty_weights():
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=hidden, num_layers=2, text_dim=4096
        )
    inputs = {
        "hidden_states": torch.zeros(1, 16, 21, 90, 160),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "timestep": torch.tensor([500]),
    }
    macs = count_macs(transformer, inputs)
    assert macs["blocks.1.attn1.to_q"] == tokens * width**2
    assert macs["blocks.1.ffn.net.2"] == tokens * hidden * width
    attention = 2 * width * (tokens * tokens + tokens * 512)
    patches = tokens * width * 16 * 2 * 2  # by a convolution over time as well, which is no layer to quantize
    assert macs["blocks.1.attn1"] + macs["blocks.1.attn2"] == attention
    assert macs[""] == sum(macs[name] for name in macs if name) + patches


class Nested(nn.Module):
    """No argument has a usual name; rows lie in lists; a mask is read, and picks tokens; positions are no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)
        self.positions = torch.randn(16, 8)

    def forward(self, x: list, cond: dict) -> list:
        mask = cond["mask"][:, : int(cond["mask"].sum()) + 1]
        text = self.into(cond["text"][:, : mask.shape[1]])[mask.bool()][None]
        hidden = [self.into(each) + self.positions[: len(each)].to(each.device) for each in x]
        hidden = [F.scaled_dot_product_attention(each[None], text, text)[0] for each in hidden]
        return [self.out(each) for each in hidden]


def test_arguments_have_any_name_and_nesting_and_may_decide_shapes():
    inputs = {
        "x": [torch.randn(16, 4), torch.randn(9, 4)],
        "cond": {"text": torch.randn(1, 7, 4), "mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])},
    }
    macs = count_macs(on_meta(Nested()), inputs)
    assert macs == {"into": (6 + 25) * 4 * 8, "out": 25 * 8 * 4, "": (6 + 25 + 25) * 32 + 2 * 25 * 5 * 8}


class Routed(nn.Module):
    """Tokens go to the expert that a gate chooses: which, nobody knows without the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 8), nn.Linear(4, 32)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = F.scaled_dot_product_attention(tokens, tokens, value=tokens)
        chosen = self.gate(tokens).argmax(-1)
        return sum(expert(tokens[chosen == index]).sum() for index, expert in enumerate(self.experts))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_model_that_reads_what_its_weights_made_is_called_as_it_is(backend):
    torch.manual_seed(0)
    model, tokens = Routed(), torch.randn(1, 1, 50, 4)
    first = int((model.gate(F.scaled_dot_product_attention(tokens, tokens, tokens)).argmax(-1) == 0).sum())
    assert 0 < first < 50
    with sdpa_kernel(backend):
        macs = count_macs(model, {"tokens": tokens})
    layers = {"gate": 50 * 8, "experts.0": first * 32, "experts.1": (50 - first) * 128}
    assert macs == layers | {"": sum(layers.values()) + 2 * 50 * 50 * 4}
    with pytest.raises(RuntimeError):
        count_macs(on_meta(model), {"tokens": tokens})


def test_an_error_of_the_model_itself_is_raised(small_model):
    with pytest.raises(TypeError, match="no_such_argument"):
        count_macs(small_model.transformer, small_model.step_inputs(1) | {"no_such_argument": None})


class Attending(nn.Module):
    def __init__(self, **how) -> None:
        super().__init__()
        self.to_q, self.to_v, self.how = nn.Linear(16, 32), nn.Linear(16, 24), how

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k = self.to_q(x).unflatten(-1, (4, 8)).transpose(1, 2), self.to_q(context).unflatten(-1, (4, 8))
        v = self.to_v(context).unflatten(-1, (4, 6)).transpose(1, 2)
        return F.scaled_dot_product_attention(query=q, key=k.transpose(1, 2), value=v, **self.how)


@pytest.mark.parametrize(
    "how", [{}, {"is_causal": True}, {"attn_mask": torch.ones(1, 1, 9, 5, dtype=torch.bool)}], ids=str
)
def test_attention_is_two_whole_products_whatever_masks_it(how):
    model, inputs = Attending(**how), {"x": torch.randn(2, 9, 16), "context": torch.randn(2, 5, 16)}
    expected = counted_for_real(model, inputs)
    assert count_macs(on_meta(model), inputs) == expected
    assert expected[""] == (2 * (9 + 5) * 16 * 32 + 2 * 5 * 16 * 24) + 2 * 4 * 9 * 5 * (8 + 6)


def test_what_had_values_never_loses_them_unseen():
    """A table that is overwritten with what a weight made has no values afterwards: reading it must not give old ones."""

    class Overwriting(nn.Linear):
        def forward(self, x):
            table = torch.zeros(3, dtype=torch.float32)
            table[0] = super().forward(x).sum()
            return super().forward(x[: int(table[0] > 0) + 1])

    model = Overwriting(4, 4)
    nn.init.ones_(model.weight)
    assert count_macs(model, {"x": torch.ones(2, 4)})[""] == 2 * 2 * 16


def test_counting_leaves_the_transformer_alone_and_shares_no_weight(small_model):
    copy = on_meta(small_model.transformer)
    assert all(parameter.is_meta for parameter in copy.parameters())
    assert not any(parameter.is_meta for parameter in small_model.transformer.parameters())
    assert not any(buffer.is_meta for buffer in copy.buffers())
    assert counting.float_dtype(copy) == counting.float_dtype(small_model.transformer)
