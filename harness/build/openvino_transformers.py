"""Transformers that have no OpenVINO model, by name, and why: what its converter, or an export with one prediction, does not hold.

Found with OpenVINO 2026.4 and diffusers 0.42; `tests/build/test_openvino_families.py` has those that convert.
"""

from __future__ import annotations

from torch import nn

ROWS = "traced, it computes so many samples as it was shown, and no other number"
REFUSED = {
    "AllegroTransformer3DModel": "OpenVINO's converter cannot infer the sizes that its attention is reshaped to",
    "ChromaTransformer2DModel": ROWS,
    "Experts": "two transformers share the steps by noise level, and an OpenVINO model would be one of them",
    "HiDreamImageTransformer2DModel": "its positions are a product in float64 by lists, for which OpenVINO's converter has no rule",
    "HunyuanVideo15Transformer3DModel": ROWS,
    "HunyuanVideoTransformer3DModel": "torch cannot trace how it fills its mask",
    "LTX2VideoTransformer3DModel": "it predicts picture and sound, and an OpenVINO export has one prediction",
    "Lumina2Transformer2DModel": "its positions are complex numbers, which OpenVINO's converter does not repeat",
    "MochiTransformer3DModel": ROWS,
    "ZImageTransformer2DModel": "it takes and gives lists of tensors, and an OpenVINO model has tensors",
}


def refused(transformer: nn.Module) -> str | None:
    """Why a transformer has no OpenVINO model, or None where nothing is known against it."""
    return REFUSED.get(type(transformer).__name__)
