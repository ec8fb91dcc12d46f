"""Parts that a pipeline's index leaves empty: refused when it is loaded where the pipeline draws nothing without them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_cases import edit, load, refused

NONE = [None, None]


def without(folder: Path, *parts: str) -> None:
    for part in parts:
        edit(folder / "model_index.json", **{part: NONE})
        shutil.rmtree(folder / part, ignore_errors=True)


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "text_encoder_2", "vae", "transformer"])
def test_a_part_without_which_nothing_is_drawn_is_refused_by_name(part, own_flux):
    without(own_flux, part)
    assert f"its {part} is empty, and a FluxPipeline draws nothing without it" in refused(own_flux)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_text_encoder_that_a_pipeline_calls_optional_is_not_where_prompts_are_read(part, folders, tmp_path):
    folder = Path(shutil.copytree(folders["pixart"], tmp_path / "pixart"))
    without(folder, part)
    assert f"its {part} is empty" in refused(folder, "pixart")


def test_sd3_does_without_t5(folders, tmp_path):
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "sd3"))
    without(folder, "text_encoder_3", "tokenizer_3")
    assert load(folder, "sd3").pipe.text_encoder_3 is None


def test_wan_with_one_transformer_is_whole_unless_its_last_steps_are_anothers(folders, tmp_path):
    folder = Path(shutil.copytree(folders["wan"], tmp_path / "wan"))
    without(folder, "transformer_2")
    load(folder, "wan")
    edit(folder / "model_index.json", boundary_ratio=0.9)
    assert "boundary_ratio=0.9 hands its last steps to a transformer_2, and that is empty" in refused(folder, "wan")
