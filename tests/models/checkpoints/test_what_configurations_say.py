"""Weights that a configuration does not know, and configurations of another class: left out by the libraries, refused here."""

from __future__ import annotations

import logging
import shutil

import diffusers
import pytest
from checkpoint_cases import LAYER, WEIGHTS, edit, edit_weights, load, refused

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.heard import LIBRARIES, listening

TEXT_WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    "values, name",
    [
        ({"num_layers": 1}, "transformer_blocks.1."),
        ({"num_single_layers": 0}, "single_transformer_blocks.0."),
        ({"guidance_embeds": False}, "time_text_embed.guidance_embedder."),
    ],
)
def test_a_transformer_that_its_configuration_cuts_short_is_refused(values, name, own_flux):
    edit(own_flux / "transformer" / "config.json", **values)
    said = refused(own_flux)
    assert f"its FluxTransformer2DModel has weights that its configuration does not know ({name}" in said


def test_the_same_of_a_transformer_beside_its_pipeline(folders, own_flux):
    edit(own_flux / "transformer" / "config.json", num_layers=1)
    assert "does not know" in refused(folders["flux"], transformer=str(own_flux))
    edit(own_flux / "transformer" / "config.json", num_layers=2)
    load(own_flux, transformer=str(folders["flux"] / "transformer" / WEIGHTS))


def test_the_same_of_a_vae(own_flux):
    edit(own_flux / "vae" / "config.json", mid_block_add_attention=False)
    assert "its AutoencoderKL has weights that" in refused(own_flux)


@pytest.mark.parametrize("part, name", [("text_encoder", "layers.1."), ("text_encoder_2", "encoder.block.1.")])
def test_the_same_of_a_text_encoders_layers(part, name, own_flux):
    def twice(tensors):
        for key in list(tensors):
            tensors[key.replace(name.replace("1", "0"), name)] = tensors[key].clone()

    edit_weights(own_flux / part / TEXT_WEIGHTS, twice)
    assert name in (said := refused(own_flux)) and "does not know" in said


def test_a_text_encoder_that_was_cut_out_of_a_larger_model_is_whole(own_flux):
    """CLIP's other half, and a table that older versions saved."""
    edit_weights(
        own_flux / "text_encoder" / TEXT_WEIGHTS,
        lambda tensors: tensors.update(
            {
                "vision_model.encoder.layers.0.mlp.fc1.weight": next(iter(tensors.values())).clone(),
                "logit_scale": next(iter(tensors.values())).clone(),
            }
        ),
    )
    load(own_flux)


def test_what_older_versions_saved_and_nobody_reads_is_passed_over(folders, tmp_path):
    """PixArt's first checkpoints hold the caption's null beside the weights."""
    folder = tmp_path / "pixart"
    shutil.copytree(folders["pixart"], folder)
    edit_weights(
        folder / "transformer" / WEIGHTS,
        lambda tensors: tensors.update({"caption_projection.y_embedding": next(iter(tensors.values())).clone()}),
    )
    load(folder, "pixart")


@pytest.mark.parametrize("name", ["NoSuchModel", "PixArtTransformer2DModel", 3])
def test_a_configuration_of_another_class_is_refused_by_both_names(name, own_flux):
    edit(own_flux / "transformer" / "config.json", _class_name=name)
    assert f"config.json is of a {name}, the pipeline has a FluxTransformer2DModel" in refused(own_flux)


def test_a_class_by_the_name_that_it_had_is_read(folders, tmp_path):
    folder = tmp_path / "pixart"
    shutil.copytree(folders["pixart"], folder)
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    load(folder, "pixart")


def renamed(tensors) -> None:
    for name in list(tensors):
        tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)


def other_layer(tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.0", "layers.5")] = tensors.pop(name)


@pytest.mark.parametrize(
    "part, file, change", [("transformer", WEIGHTS, renamed), ("text_encoder", TEXT_WEIGHTS, other_layer)]
)
def test_no_wall_of_text_stands_before_the_line(part, file, change, own_flux, printed):
    edit_weights(own_flux / part / file, change)
    assert "no weights for " in refused(own_flux)
    assert not printed


def test_weights_are_not_made_up_where_the_libraries_are_told_to_be_silent(own_flux):
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        edit_weights(own_flux / "transformer" / WEIGHTS, lambda tensors: tensors.pop(f"{LAYER}.weight"))
        assert f"no weights for {LAYER}.weight" in refused(own_flux)
    finally:
        diffusers.utils.logging.set_verbosity_warning()


def test_what_the_libraries_warn_of_is_heard_when_all_goes_well_and_only_then():
    heard: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("diffusers")
    handler.emit = lambda entry: heard.append(entry.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with listening():
            logging.getLogger("diffusers.models").warning("a warning")
            assert not heard
        with pytest.raises(UserError), listening():
            logger.warning("of something that is refused")
            raise UserError
    finally:
        logger.removeHandler(handler)
    assert heard == ["a warning"] and logger.propagate is False


def test_the_libraries_loggers_are_left_as_they_were():
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    with pytest.raises(UserError), listening():
        raise UserError
    assert [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers] == before
