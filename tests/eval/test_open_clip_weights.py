"""open_clip's checkpoints in transformers' CLIPModel: against a slow forward pass of open_clip's layout, and against open_clip itself."""

from __future__ import annotations

import open_clip_cases as cases
import pytest
import torch

from ditbench.eval.open_clip_weights import as_transformers

IDS = [0, 7, 33, 2, 1]


def in_transformers(state):
    from transformers import CLIPModel

    model = CLIPModel(cases.config()).eval()
    model.load_state_dict(as_transformers(state))  # strict: every tensor finds its place, and none is left
    return model


def pictures():
    return torch.randn(3, 3, cases.VISION["side"], cases.VISION["side"], generator=torch.Generator().manual_seed(1))


def test_pictures_and_texts_have_the_vectors_of_a_slow_forward_pass_in_open_clips_layout():
    state, pixels = cases.random_state(), pictures()
    with torch.no_grad():
        model = in_transformers(state)
        both = model(pixel_values=pixels, input_ids=torch.tensor([IDS]))
    expected = torch.stack([cases.seen(state, picture) for picture in pixels])
    assert expected.std(dim=0).max() > 0.01, "the pictures differ"
    torch.testing.assert_close(both.image_embeds.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.text_embeds[0].double(), cases.read(state, IDS), atol=1e-5, rtol=1e-4)
    assert model.logit_scale.item() == pytest.approx(4.6)


def test_a_tensor_that_open_clips_clip_has_not_is_named():
    with pytest.raises(KeyError, match=r"score_predictor\.weight is no tensor"):
        as_transformers({"score_predictor.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"transformer\.resblocks\.0\.ls_1\.gamma is no tensor"):
        as_transformers({"transformer.resblocks.0.ls_1.gamma": torch.zeros(1)})


def test_it_is_what_open_clips_own_class_computes():
    """Where open_clip is installed; ours does not need it."""
    model_module = pytest.importorskip("open_clip.model")
    vision, text = cases.VISION, cases.TEXT
    theirs = model_module.CLIP(
        cases.OUT,
        {"width": vision["width"], "head_width": vision["width"] // vision["heads"], "layers": vision["layers"],
         "patch_size": vision["patch"], "image_size": vision["side"], "mlp_ratio": vision["mlp"] / vision["width"]},
        {"width": text["width"], "heads": text["heads"], "layers": text["layers"], "vocab_size": text["words"],
         "context_length": text["positions"], "mlp_ratio": text["mlp"] / text["width"]},
    ).eval()  # fmt: skip
    state, pixels = cases.random_state(), pictures()
    theirs.load_state_dict(state)
    last = text["words"] - 1  # it reads a text at its largest token
    ids = torch.tensor([[0, 7, 33, 2, last] + [0] * (text["positions"] - 5)])
    with torch.no_grad():
        image, words, _ = theirs(pixels, ids)
    torch.testing.assert_close(
        image.double(), torch.stack([cases.seen(state, p) for p in pixels]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(words[0].double(), cases.read(state, [0, 7, 33, 2, last]), atol=1e-5, rtol=1e-4)
