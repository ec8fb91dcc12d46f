"""A model without weights has the fingerprint, shapes and operations of the loaded one, in next to no memory."""

from __future__ import annotations

import pytest
import torch
from small_pipelines import SIZES, SMALL
from torch.utils.flop_counter import FlopCounterMode

from ditbench.harness.backends import few_rows
from ditbench.harness.build.build import float_copy
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.counts import counted
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.macs import Attention
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt

ZOO = ("tiny-dit", "tiny-t2i", "tiny-video")
FAMILIES = {"tiny-dit": "dit", "tiny-t2i": "pixart", "tiny-video": "cogvideox"}
SAMPLERS = {"tiny-dit": "ddim", "tiny-t2i": "dpm++", "tiny-video": "pipeline"}


def zoo(name: str) -> ModelSpec:
    return ModelSpec(name, FAMILIES[name], source=f"zoo:{name}")


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_loaded_model_without_its_weights(name):
    bare, whole = skeleton(zoo(name)), load_model(zoo(name))
    assert bare.fingerprint == whole.fingerprint and bare.extras == whole.extras
    assert {parameter.device.type for parameter in bare.transformer.parameters()} == {"meta"}
    shapes = [{n: (t.shape, t.dtype) for n, t in each.transformer.named_parameters()} for each in (bare, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ZOO)
def test_operations_of_a_sample_are_those_of_drawing_one(name, monkeypatch):
    """From prompt to pixels, by torch's own counter on the loaded model; rows that few are filled up with are not counted."""
    monkeypatch.setattr(few_rows, "LEAST", 0)
    sampler = Sampler(SAMPLERS[name], 3, 2.0)
    counts = counted(skeleton(zoo(name)), sampler)
    model = load_model(zoo(name))
    told = name != "tiny-dit"
    wanted = Conditions((0,), None if told else torch.zeros(1, dtype=torch.long), (Prompt("a red circle"),) * told)
    transformer = float_copy(model.target(), dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as products, Attention(products) as attention:
        drawn = model.adapter.sample(model.pipe, transformer, wanted, sampler)
    macs = (products.get_total_flops() - attention.seen_flops) // 2 + attention.macs
    assert 3 * counts.step_macs + counts.text_macs + counts.decode_macs == macs
    assert counts.rows == 2 and counts.call_macs == model.macs[""] and not counts.unknown
    assert (*drawn.pixels.shape[1:-3], *drawn.pixels.shape[-2:]) == counts.pixels


@pytest.mark.parametrize("name", ["flux", "pixart", "sd3", "wan", "sana", "ltx"])
def test_families_with_encoders_and_a_vae_are_counted_without_weights(name, tmp_path):
    pipe = SMALL[name]()
    pipe.save_pretrained(tmp_path)
    counts = counted(
        skeleton(ModelSpec("small", name, source=str(tmp_path), size=SIZES.get(name))), Sampler("pipeline", 2, 3.0)
    )
    assert not counts.unknown and counts.text_macs > 0 and counts.decode_macs > 0
    assert counts.rows == (1 if name == "flux" else 2)  # flux is told its guidance


def test_a_true_size_is_counted_without_its_weights_being_drawn(monkeypatch):
    """DiT-XL/2: 118.6 billion multiply-accumulates a row, as its paper says (Tab. 4, Gflops), 0.75 billion weights."""
    random = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
    random |= {"num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, **_: _without_values(weight))
    counts = counted(skeleton(ModelSpec("xl", "dit", random=random, dtype="bfloat16")), Sampler("ddim", 2, 1.5))
    assert counts.call_macs == pytest.approx(118.6e9, rel=0.01) and counts.weights > 1.4e9
    assert counts.call_bytes < 30e6, "weights are not activations"


def _without_values(weight: torch.Tensor) -> torch.Tensor:
    assert weight.is_meta
    return weight
