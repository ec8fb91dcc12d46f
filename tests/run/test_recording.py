"""A recording keeps every call as it was made, is read by step and rows, and stores once what is equal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.calibration.on_disk import TensorFiles
from ditbench.harness.calibration.recorder import Recorder, read
from ditbench.harness.calibration.recording import Calibration, between, picked, selected
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.calls import Call
from ditbench.harness.quant.steps import StepClock

DIMS = {"latents": 0, "text": 0, "ids": None}


def arguments(first: int, rows: int, tokens: int, step: int = 0) -> dict:
    """latents (B, 2): the row's number and the step. text (B, T, 1): the same at all steps."""
    number = torch.arange(first, first + rows, dtype=torch.float32)
    return {
        "latents": torch.stack([number, torch.full_like(number, step)], 1),
        "text": number[:, None, None].repeat(1, tokens, 1),
        "ids": torch.zeros(3, 2),
    }


def recorded(folder, steps: int = 2) -> Recorder:
    """Per step as two batches with guidance are: prompts of 5 and 7 tokens, null ones of 2: four calls, rows 0 … 9."""
    recorder = Recorder(steps, DIMS, TensorFiles(folder))
    for step in range(steps):
        for first, rows, tokens in ((0, 3, 5), (3, 3, 2), (6, 2, 7), (8, 2, 2)):
            recorder(step, arguments(first, rows, tokens, step))
    return recorder


def finished(recorder: Recorder) -> tuple[tuple[Call, ...], ...]:
    recorder.finish()
    return read(recorder.files.folder)[0]


@pytest.fixture
def calibration(tmp_path) -> Calibration:
    return Calibration(finished(recorded(tmp_path)), "key")


def numbers(call: Call) -> list[int]:
    return [int(number) for number in call["latents"][:, 0]]


class Doubling(nn.Module):
    """latents → 2 · latents, and keeps the number of tokens of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.tokens = StepClock(None), []

    def forward(self, latents: Tensor, text: Tensor, ids: Tensor) -> SimpleNamespace:
        assert len(text) == len(latents) and ids.shape == (3, 2)
        self.tokens.append(text.shape[1])
        return SimpleNamespace(sample=2 * latents)


def test_rows_are_counted_through_the_calls_and_those_alike_are_side_by_side(calibration):
    assert calibration.num_rows(0) == 10 and calibration.num_steps == 2
    found = calibration.rows(1, 4)
    assert [numbers(call) for call in found] == [[0], [3, 9], [6]], "0, 3, 6 and 9 of 10"
    assert [call["text"].shape[1] for call in found] == [5, 2, 7]
    assert all(int(call["latents"][0, 1]) == 1 for call in found)


def test_rows_come_in_the_order_asked_for(calibration):
    found = picked(calibration.steps[0], torch.tensor([9, 4, 8, 0, 4]))
    assert [numbers(call) for call in found] == [[0], [9, 4, 8, 4], []]


def test_batches_go_through_all_rows_of_one_shape_at_a_time(calibration):
    found = [(step, numbers(call)) for step, call in calibration.batches(4)]
    assert found[:4] == [(0, [0, 1, 2]), (0, [3, 4, 5, 8]), (0, [9]), (0, [6, 7])]
    assert len(found) == calibration.num_batches(4) == 8
    assert [step for step, _ in calibration.batches(steps=[1])] == [1, 1, 1]


def test_a_batch_of_one_call_copies_nothing(calibration):
    call = calibration.steps[0][0].pick(slice(None))
    assert between([call], 1, 3)["text"].data_ptr() == call["text"][1:].data_ptr()


def test_calls_of_several_shapes_give_one_output_with_a_row_each(calibration):
    model = Doubling()
    output = calibration.call(model, 1, calibration.rows(1, 4)).sample
    assert output[:, 0].tolist() == [0, 6, 18, 12] and output[:, 1].tolist() == [2, 2, 2, 2]
    assert model.tokens == [5, 2, 7] and int(model.clock.step) == 1


def test_outputs_that_are_lists_become_one_tensor(tmp_path):
    class Lists(Doubling):
        def forward(self, x: list[Tensor]) -> SimpleNamespace:
            return SimpleNamespace(sample=[2 * each for each in x])

    recorder = Recorder(1, {"x": 0}, TensorFiles(tmp_path))
    recorder(0, {"x": [torch.ones(2, 2), 2 * torch.ones(2, 2)]})
    calibration = Calibration(finished(recorder), "key")
    output = calibration.call(Lists(), 0, calibration.rows(0, 2)).sample
    assert output[:, 0, 0].tolist() == [2, 4] and output.shape == (2, 2, 2)


def test_selected_rows_may_come_several_times_or_not_at_all(calibration):
    chosen = selected(calibration, [torch.tensor([3, 3, 0]), torch.tensor([], dtype=torch.int64)], "some")
    assert [chosen.num_rows(step) for step in (0, 1)] == [3, 0] and chosen.key != calibration.key
    assert [numbers(call) for _, call in chosen.batches()] == [[0], [3, 3]] and chosen.rows(1, 2) == []


def test_whole_steps_are_only_given_where_the_calls_are_alike(calibration, tmp_path):
    with pytest.raises(UserError, match="differ in their shapes"):
        _ = calibration.per_step
    recorder = Recorder(1, DIMS, TensorFiles(tmp_path))
    for first in (0, 2):
        recorder(0, arguments(first, 2, 5))
    (whole,) = Calibration(finished(recorder), "key").per_step
    assert numbers(whole) == [0, 1, 2, 3]


def test_what_is_equal_at_all_steps_is_stored_once_and_tables_are_held_once(tmp_path):
    recorder = recorded(tmp_path, steps=5)
    first, *others = finished(recorder)
    for calls in others:
        for one, other in zip(first, calls, strict=True):
            assert one.rows["text"] is other.rows["text"] and one.rows["latents"] is not other.rows["latents"]
            assert one.shape.shared["ids"] is first[0].shape.shared["ids"]
    assert len(recorder.files.places) == 4 * 5 + 4 + 1, "latents of every call, four texts, one table"


def test_every_call_is_given_back_as_it_was_made(tmp_path):
    recorder = recorded(tmp_path)
    recorder.finish(["a.b"])
    steps, unreached = read(tmp_path)
    assert unreached == ("a.b",)
    for step, calls in enumerate(steps):
        for call, (first, rows, tokens) in zip(calls, ((0, 3, 5), (3, 3, 2), (6, 2, 7), (8, 2, 2)), strict=True):
            made = arguments(first, rows, tokens, step)
            found = call.arguments()
            assert made.keys() == found.keys() and all(torch.equal(made[name], found[name]) for name in made)


def test_a_recording_does_not_change_with_the_tensors_it_was_shown(tmp_path):
    recorder, shown = Recorder(1, DIMS, TensorFiles(tmp_path)), arguments(0, 2, 3)
    recorder(0, shown)
    shown["latents"].zero_(), shown["text"].zero_()
    (call,) = finished(recorder)[0]
    assert numbers(call) == [0, 1] and float(call["text"][1, 0, 0]) == 1


def test_steps_without_a_call_and_calls_after_the_last_step_are_refused(tmp_path):
    recorder = Recorder(2, DIMS, TensorFiles(tmp_path))
    recorder(0, arguments(0, 2, 3))
    with pytest.raises(UserError, match="not called at step 1"):
        recorder.finish()
    with pytest.raises(UserError, match=r"protocol.steps=2, but .* first-order sampler"):
        recorder(2, arguments(0, 2, 3))


def test_statistics_of_a_layer_that_saw_nothing_at_a_step_are_refused(small_target, small_calibration):
    everything, nothing = torch.arange(small_calibration.num_rows(0)), torch.tensor([], dtype=torch.int64)
    chosen = selected(small_calibration, [everything, everything, nothing, everything], "not the third")
    with pytest.raises(UserError, match="saw no token at step 2 .* raise calibration.n"):
        channel_stats(small_target, chosen)
