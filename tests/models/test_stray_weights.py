"""Weights that no layer holds: refused where they are many, in the record's share of MACs where they are few."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as F
from generic_pipelines import GENERIC, lively, qwen_image
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.families.generic import FAMILY
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.macs import count_macs
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.models.stray_weights import check_weights_are_of_layers
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.recipe import ModelRecipe

WIDTH, EXPERTS, TOKENS = 8, 4, 12


def nucleus(**more: object) -> nn.Module:
    return diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, num_layers=6, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6), num_experts=8, moe_intermediate_dim=64, **more,
    )  # fmt: skip


class Experts(nn.Module):
    """One matrix each in one parameter, as a class of somebody's own would have them."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.grouped = grouped

    def forward(self, x: Tensor) -> Tensor:
        if self.grouped:
            ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=x.device) * (len(x) // EXPERTS)
            return F.grouped_mm(x, self.weights, offs=ends)
        return torch.cat([part @ weight for part, weight in zip(x.chunk(EXPERTS), self.weights, strict=True)])


class Block(nn.Module):
    def __init__(self, experts: nn.Module, layers: int = 1) -> None:
        super().__init__()
        self.layers, self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers)), experts

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.experts(x)


class Transformer(nn.Module):
    def __init__(self, experts: nn.Module, layers: int = 1) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(experts, layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks[0](x)


def test_experts_that_belong_to_no_layer_are_refused_by_name():
    transformer = nucleus()
    wanted = r"a NucleusMoE\w+ keeps \d+ % .* transformer_blocks\.3\.img_mlp\.experts\.gate_up_proj \(8, 32, 128\)"
    with pytest.raises(UserError, match=wanted):
        check_weights_are_of_layers(transformer, FAMILY.blocks(transformer))


def test_a_model_without_experts_and_gates_that_choose_them_are_not_refused():
    dense = nucleus(moe_enabled=False)
    check_weights_are_of_layers(dense, FAMILY.blocks(dense))
    for name in ("hidream", "aura_flow"):
        transformer = GENERIC[name]().transformer
        check_weights_are_of_layers(transformer, FAMILY.blocks(transformer))


def test_it_is_refused_when_it_is_loaded_and_when_it_is_planned(tmp_path):
    parts = qwen_image().components
    pipe = diffusers.QwenImagePipeline(**parts | {"transformer": nucleus()})
    pipe.save_pretrained(tmp_path)
    spec = ModelSpec("small-nucleus", "generic", source=str(tmp_path))
    for made in (load_model, skeleton):
        with pytest.raises(UserError, match="small-nucleus.* belong to no linear layer"):
            made(spec)


@pytest.mark.parametrize("layers", [1, 8])
def test_weights_of_a_list_or_of_two_dimensions_are_seen_too(layers):
    """One of two, or of nine, matrices of the block."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH))])

    transformer = Transformer(Listed(), layers)
    with pytest.raises(UserError, match=rf"keeps {round(100 / (layers + 1))} % .*\.experts\.all\.0 \(8, 8\)"):
        check_weights_are_of_layers(transformer, ["transformer_blocks.0"])
    many = Transformer(Listed(), 10)  # one of eleven
    check_weights_are_of_layers(many, ["transformer_blocks.0"])


@pytest.mark.parametrize("grouped", [False, True])
def test_what_no_layer_multiplies_counts_and_lowers_the_share(grouped):
    transformer = Transformer(Experts(grouped), 3).to(torch.bfloat16)
    macs = count_macs(transformer, {"x": torch.randn(TOKENS, WIDTH)})
    assert macs[""] == 4 * TOKENS * WIDTH * WIDTH
    model = LoadedModel(ModelSpec("own", "generic"), type("Pipe", (), {"transformer": transformer})(), FAMILY)
    bits, _ = account(model.target(), ModelRecipe({}), macs, "")
    assert bits["mac_share_of_no_layer"] == pytest.approx(1 / 4)


def test_nucleus_counts_its_experts_either_way():
    inputs = {
        "hidden_states": torch.randn(1, 16, 16), "img_shapes": [(1, 4, 4)], "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.full((1,), 0.5),
    }  # fmt: skip
    in_turn, grouped = (
        count_macs(lively(nucleus(use_grouped_mm=each)).bfloat16(), inputs)[""] for each in (False, True)
    )
    dense = count_macs(lively(nucleus(moe_enabled=False)), inputs)[""]
    assert in_turn == grouped != dense
