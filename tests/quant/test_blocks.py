"""How a block is called: one stream, two streams in either order, and none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.blocks import NotInLine, OneStream, TwoStreams, by_name, tokens_of

TEXT, IMAGE = torch.ones(2, 3, 4), torch.zeros(2, 5, 4)


class Double(nn.Module):
    """Text and image tokens each get their own number added, and swap nothing."""

    def __init__(self, text_first: bool, last: bool = False) -> None:
        super().__init__()
        self.text_first, self.last = text_first, last

    def forward(self, hidden_states, encoder_hidden_states, temb=0.0):
        text = None if self.last else encoder_hidden_states + 10 + temb
        image = hidden_states + 20 + temb
        return (text, image) if self.text_first else (image, text)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("by_place", [True, False])
def test_two_streams_are_one_state_text_first(text_first, by_place):
    names = ("encoder_hidden_states", "hidden_states")
    call = TwoStreams(outputs=names if text_first else names[::-1], by_place=by_place)
    block = Double(text_first)
    arguments = by_name(block, (IMAGE,), {"encoder_hidden_states": TEXT, "temb": 0.5})
    state, rest = call.enter(block, arguments)
    assert torch.equal(state, torch.cat([TEXT, IMAGE], 1))
    behind = call.run(block, state, rest)
    assert torch.equal(behind, torch.cat([TEXT + 10.5, IMAGE + 20.5], 1))
    assert torch.equal(call.run(block, behind, rest), torch.cat([TEXT + 21, IMAGE + 41], 1))


def test_a_last_block_without_text_leaves_the_image():
    call = TwoStreams(outputs=("encoder_hidden_states", "hidden_states"))
    state, rest = call.enter(Double(True), {"hidden_states": IMAGE, "encoder_hidden_states": TEXT})
    assert torch.equal(call.run(Double(True, last=True), state, rest), IMAGE + 20)


def test_one_stream_takes_the_first_argument_whatever_its_name():
    class Single(nn.Module):
        def forward(self, x, temb):
            return x + temb

    state, rest = OneStream().enter(Single(), by_name(Single(), (IMAGE, 3.0), {}))
    assert state is IMAGE and rest == {"temb": 3.0}
    assert torch.equal(OneStream().run(Single(), state, rest), IMAGE + 3)


def test_a_block_that_gives_two_outputs_is_no_single_stream():
    with pytest.raises(TypeError, match="Double gives a tuple, not one tensor.*how its blocks are called"):
        OneStream().run(Double(True), IMAGE, {"encoder_hidden_states": TEXT})


def test_blocks_that_do_not_follow_each_other_are_refused_with_the_reason():
    for call in (lambda c: c.enter(Double(True), {}), lambda c: c.run(Double(True), IMAGE, {})):
        with pytest.raises(UserError, match="block by block cannot be used with this model: long skips"):
            call(NotInLine("long skips"))


def test_what_a_block_gave_is_compared_whatever_its_streams():
    assert torch.equal(tokens_of(IMAGE), IMAGE.flatten(1))
    assert tokens_of((TEXT, None, IMAGE)).shape == (2, 3 * 4 + 5 * 4)
