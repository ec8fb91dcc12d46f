"""The training of the text models: stopped and resumed is never stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.zoo import captioned, tiny_t2i, tiny_video

FAMILIES = {"tiny-t2i": tiny_t2i, "tiny-video": tiny_video}


@pytest.fixture(params=FAMILIES)
def zoo_model(request, monkeypatch):
    """Two scenes a step."""
    module = FAMILIES[request.param]
    monkeypatch.setattr(module, "BATCH", 2)
    return module


def test_a_resumed_training_gives_the_same_weights_as_one_that_was_never_stopped(zoo_model, tmp_path):
    schedule = replace(zoo_model.SCHEDULE, steps=3, warmup=1, ema_decay=0.5, checkpoint_every=1)
    whole, losses = zoo_model.train_model(tmp_path / "whole.pt", schedule)

    usual, steps = captioned.clean_loss, []

    def stops_in_the_third_step(*arguments):
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return usual(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioned, "clean_loss", stops_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            zoo_model.train_model(tmp_path / "stopped.pt", schedule)
    resumed, again = zoo_model.train_model(tmp_path / "stopped.pt", schedule)
    assert again == losses and len(losses) == 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    fresh = zoo_model.new_model(schedule.seed).state_dict()
    moved = [name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, fresh[name])]
    assert any(name.startswith("text_encoder") for name in moved) and any(name.startswith("transf") for name in moved)


def test_pairs_are_drawn_from_the_generator_alone(zoo_model):
    draw = lambda seed: zoo_model.pairs(3, torch.Generator().manual_seed(seed))  # noqa: E731
    (one, captions), (same, same_captions), (other, _) = draw(0), draw(0), draw(1)
    assert torch.equal(one, same) and captions == same_captions and not torch.equal(one, other)
    assert one.min() >= -1 and one.max() <= 1 and one.shape[-3] == 3 and len(captions) == len(one) == 3
