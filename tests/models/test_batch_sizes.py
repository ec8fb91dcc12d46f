"""`auto` finds a batch from tokens and from what one more sample takes; a recording made in halves is the same recording."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.common.batches import OutOfMemory
from ditbench.harness.models import batch_sizes
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.batch_sizes import batch_of, tokens_in
from ditbench.harness.models.loading import load_model

SAMPLER = Sampler("ddim", 2, 1.5)


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec("tiny-dit", "dit", source="zoo:tiny-dit"))


@pytest.fixture
def transformer(model):
    return float_copy(model.target(), dtype=torch.float32)


def probes(monkeypatch, *bytes_held: int, tokens: int = 16, free: int = 1000) -> None:
    taken = iter(bytes_held)
    monkeypatch.setattr(batch_sizes, "free_memory", lambda device: free)
    monkeypatch.setattr(batch_sizes, "_probe", lambda *args: (next(taken), tokens))


def test_a_number_is_taken_as_it_is(model, transformer):
    assert batch_of(7, model, transformer).note() == {"size": 7, "asked": 7, "halved_from": []}


def test_the_embedded_model_gets_what_it_always_had(model, transformer):
    assert batch_of("auto", model, transformer).size == 64
    assert batch_of("auto", model, transformer, most=32).note()["size"] == 32


def test_tokens_bound_it_whatever_the_memory(model, transformer, monkeypatch):
    for tokens, expected in ((16, 64), (4608, 2), (40_000, 1)):  # FLUX.1 at 1024², a long video
        probes(monkeypatch, 10, 10, tokens=tokens)
        assert batch_of("auto", model, transformer).size == expected


def test_memory_bounds_it_to_a_power_of_two_that_fits(model, transformer, monkeypatch):
    probes(monkeypatch, 150, 200)  # 100, and 50 a sample: 14 take 800 of 1000
    assert batch_of("auto", model, transformer).size == 8
    probes(monkeypatch, 790, 1500)
    assert batch_of("auto", model, transformer).size == 1


def test_python_is_searched_for_what_nobody_holds_where_that_may_be_large_or_memory_ran_out(
    model, transformer, monkeypatch
):
    searched = []
    monkeypatch.setattr(batch_sizes, "release", searched.append)
    batch_of("auto", model, transformer)
    assert searched == [], "it takes as long as a tiny run draws"
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "forward", lambda **inputs: (_ for _ in ()).throw(MemoryError()))
        batch_of("auto", model, transformer)
    assert len(searched) == 1
    monkeypatch.setattr(batch_sizes, "SMALL_BYTES", 0)
    batch_of("auto", model, transformer)
    assert len(searched) == 2


def test_a_probe_that_runs_out_leaves_one(model, transformer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "forward", lambda **inputs: (_ for _ in ()).throw(MemoryError()))
        assert batch_of("auto", model, transformer).size == 1


def test_tokens_of_all_streams_count_and_places_of_a_map_are_tokens():
    image, text = torch.zeros(4, 20, 8), torch.zeros(4, 5, 8)
    assert tokens_in((text, image), 4) == 25 and tokens_in(image, 2) == 40  # frames as rows
    assert tokens_in(torch.zeros(4, 8, 3, 3), 4) == 9


def narrow(monkeypatch, model, room: int) -> None:
    """Calls of more than `room` rows run out of memory at their second step."""
    inner = model.adapter.sample

    def sample(pipe, transformer, conditions, sampler, *, on_call, **more):
        def watched(step, arguments):
            on_call(step, arguments)
            if step == 1 and len(conditions) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return inner(pipe, transformer, conditions, sampler, on_call=watched, **more)

    monkeypatch.setattr(model.adapter, "sample", sample)


def test_a_recording_that_had_to_be_halved_is_that_of_the_smaller_batch(model, monkeypatch):
    expected = calibrate(model, SAMPLER, 5, 0, batch_size=2)
    narrow(monkeypatch, model, room=2)
    found = calibrate(model, SAMPLER, 5, 0, batch_size=4)
    assert found.batch == {"size": 2, "asked": 4, "halved_from": [4], "rows": 64}
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert [call.num_rows for call in ours] == [call.num_rows for call in theirs] == [4, 4, 2]
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_a_sample_that_does_not_fit_is_said(model, monkeypatch):
    narrow(monkeypatch, model, room=0)
    with pytest.raises(OutOfMemory, match="calibrate: out of memory"):
        calibrate(model, SAMPLER, 2, 0, batch_size=2)
