"""What a checkpoint on the hub is can be said when its files are here: the hub's cache is looked at as a folder is."""

from __future__ import annotations

import json

import test_checkpoints
from checkpoint_cases import refused

cached_hub = test_checkpoints.cached_hub


def test_files_of_a_variant_only_are_noticed(cached_hub, folders):
    assert "add model.variant=fp16" in refused(cached_hub(folders["flux-fp16"]))


def test_quantized_weights_are_noticed(cached_hub, own_flux):
    path = own_flux / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(config))
    assert "its transformer is already quantized (bitsandbytes)" in refused(cached_hub(own_flux))
