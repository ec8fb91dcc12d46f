"""Checkpoints that lack weights: nothing is drawn at random, or left without a value, in their place."""

from __future__ import annotations

import pytest
from checkpoint_cases import WEIGHTS, refused
from safetensors.torch import load_file, save_file
from test_single_files import in_the_authors_names


@pytest.mark.parametrize("family, layer", [("ltx", "proj_in"), ("pixart", "proj_out")])
def test_a_transformers_file_without_one_weight_is_refused(family, layer, folders, tmp_path):
    """Diffusers leaves it without a value in a file that it converts, and would draw it in one in its own names."""
    tensors = load_file(folders[family] / "transformer" / WEIGHTS)
    del tensors[f"{layer}.weight"]
    save_file(in_the_authors_names(tensors) if family == "ltx" else tensors, tmp_path / "x.safetensors")
    said = refused(folders[family], family, transformer=str(tmp_path / "x.safetensors"))
    assert "the checkpoint lacks weights: it is not whole" in said
    assert family == "ltx" or f"no weights for {layer}.weight" in said
