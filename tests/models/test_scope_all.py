"""protocol.scope=all in every family: layers outside the blocks are quantized, and the model still draws."""

from __future__ import annotations

import re

import pytest
import torch
from small_pipelines import SIZES, SMALL

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.samples.samples import Prompt

PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
READ = {"wan": 2, "hunyuan_dit": 4}  # layers whose weight the model reads itself


@pytest.mark.parametrize("family", sorted(SMALL))
def test_every_layer_that_is_called_is_quantized_and_the_model_draws(family, tmp_path):
    torch.manual_seed(0)
    SMALL[family]().save_pretrained(tmp_path)
    model = load_model(ModelSpec(f"small-{family}", family, source=str(tmp_path), size=SIZES.get(family)))
    sampler = Sampler(model.adapter.SAMPLERS[0], 2, 2.0)
    whole, in_float = model.target("all"), re.compile(model.adapter.ALWAYS_FLOAT or "(?!)")
    linears = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(bool(in_float.search(name)) for name in linears) == READ.get(family, 0)
    assert not any(in_float.search(name) for name in whole.layers)
    target = whole.without(calibrate(model, sampler, n=2, seed=0, prompts=PROMPTS).unreached)
    assert target.layers == whole.layers and set(model.target().layers) < set(target.layers)

    rtn = registry.method("rtn")
    quantized = build(target, rtn.apply(target, {}, DYNAMIC, rtn.Params()), dtype=torch.float32)
    assert set(quant_layers(quantized)) == set(target.layers)
    samples = generate(model, quantized, conditions(model, 2, 0, prompts=PROMPTS), sampler, batch_size=2)
    assert bool(torch.isfinite(samples.latents[:]).all())
