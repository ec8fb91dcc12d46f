"""Transformers of true size, without their weights: on torch's meta device nothing is stored or computed, shapes are."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.known_families import family
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.macs import count_macs
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.samples.conditions import Conditions

SIZES = {  # parameters of the transformer alone, in units of 10⁹
    "pixart-xl-2-1024-random": 0.61,
    "sd3-medium-random": 2.03,
    "flux.1-dev-random": 11.90,
    "cogvideox-2b-random": 1.69,
    "wan2.1-t2v-1.3b-random": 1.42,
    "wan2.2-t2v-a14b-random": 28.58,
    "flux.2-dev-random": 32.22,
    "flux.2-klein-4b-random": 3.88,
    "qwen-image-random": 20.43,
    "z-image-random": 6.15,
    "hunyuan-video-1.5-480p-random": 8.33,
    "chroma1-hd-random": 8.90,
    "sana-video-2b-480p-random": 2.06,
    "kandinsky-5-t2v-lite-5s-random": 2.01,
    "kandinsky-5-t2i-lite-random": 6.02,
    "ltx-2-random": 18.88,
    "hidream-i1-random": 17.11,
}
OUT_OF_MORE = {"kandinsky-5-t2v-lite-5s-random": 16}  # beside its 16 channels it is told 17 that it does not give back
READS_VALUES = ("hunyuan-video-1.5-480p-random", "hidream-i1-random")  # of masks, of sizes, which `meta` has not
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 12,
    "use_additional_conditions": False,
    "inputs": {
        "hidden_states": [4, 8, 8], "encoder_hidden_states": [3, 12],
        "encoder_attention_mask": {"shape": [3], "value": 1}, "timestep": {"shape": [], "value": 500},
    },
}  # fmt: skip


def test_every_model_with_random_weights_and_no_pipeline_is_listed_here():
    found = {path.stem for path in (CONF / "model").glob("*-random.yaml")}
    assert found == set(SIZES) | {"dit-xl-2-256-random"}


@pytest.mark.parametrize("name", SIZES)
def test_it_has_the_published_size_and_takes_the_call_that_is_written_down(name):
    spec = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    with torch.device("meta"):
        pipe = family(spec["family"]).random_pipeline(spec["random"], torch.bfloat16)
    assert sum(p.numel() for p in pipe.transformer.parameters()) / 1e9 == pytest.approx(SIZES[name], abs=0.01)
    if name in READS_VALUES:
        family(spec["family"]).prepare(pipe)
        pipe.transformer.eval()
        assert count_macs(pipe.transformer, pipe.step_inputs(1))[""] > 1e12
        return
    with torch.device("meta"):
        inputs = tree_map_only(
            Tensor,
            lambda value: value.to("meta", torch.bfloat16 if value.is_floating_point() else None),
            pipe.step_inputs(2),
        )
        output = pipe.transformer(**inputs).sample
    drawn = next(iter(inputs.values()))
    assert len(output) == 2 and output[1].shape[1:-1] == drawn[1].shape[1:-1]
    assert output[1].shape[-1] == OUT_OF_MORE.get(name, drawn[1].shape[-1])


def test_its_inputs_are_drawn_once_and_for_all_and_by_row():
    model = load_model(ModelSpec("small", "pixart", random=SMALL))
    two, again = model.step_inputs(2), model.step_inputs(2)
    assert torch.equal(two["hidden_states"], again["hidden_states"]) and two["hidden_states"].shape == (2, 4, 8, 8)
    assert two["timestep"].tolist() == [500, 500]
    assert torch.isfinite(model.transformer(**two).sample).all()


def test_positions_are_counted_from_zero_and_have_no_rows():
    inputs = TransformerOnly(torch.nn.Identity(), {"one": {"range": 3}, "three": {"range": [1, 2, 4]}}).step_inputs(5)
    several = TransformerOnly(torch.nn.Identity(), {"states": {"several": 2, "each": [3]}}).step_inputs(5)["states"]
    assert [tuple(each.shape) for each in several] == [(5, 3)] * 2
    assert inputs["one"].tolist() == [0, 1, 2] and [each.tolist() for each in inputs["three"]] == [
        [0],
        [0, 1],
        [0, 1, 2, 3],
    ]


def test_shared_arguments_have_no_rows():
    pipe = TransformerOnly(torch.nn.Identity(), {"ids": {"shape": [5, 3], "value": 0, "shared": True}, "none": None})
    assert pipe.step_inputs(4)["ids"].shape == (5, 3) and pipe.step_inputs(4)["none"] is None


def test_it_draws_nothing():
    model = load_model(ModelSpec("small", "pixart", random=SMALL))
    with pytest.raises(UserError, match="ditbench bench"):
        model.adapter.sample(model.pipe, model.transformer, Conditions((0,)), Sampler("pipeline", 1, 1.0))


def test_missing_shapes_are_asked_for():
    without = {name: value for name, value in SMALL.items() if name != "inputs"}
    with pytest.raises(UserError, match="needs `inputs`"):
        load_model(ModelSpec("small", "pixart", random=without))
