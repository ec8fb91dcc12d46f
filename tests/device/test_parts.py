"""The parts around a transformer compute on its device, and the pipeline that runs share is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.placement import placed_on
from ditbench.harness.models import encoded_prompts
from ditbench.harness.models.base import Sampler
from ditbench.harness.models.encoded_prompts import PAIR, forget_prompts
from ditbench.harness.models.parts import replaced, running_on
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt

SAMPLER = Sampler("pipeline", 2, 2.0)
CPU = torch.device("cpu")


@pytest.fixture
def pipe(model):
    forget_prompts(model.pipe)
    yield model.pipe
    forget_prompts(model.pipe)


def wanted(*texts: str) -> Conditions:
    return Conditions(tuple(range(len(texts))), prompts=tuple(map(Prompt, texts)))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].weight = module[0].weight
    return module


def held(module: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors}


def test_a_part_is_on_the_device_inside_and_is_what_it_was_behind(second):
    module = tied()
    before = held(module)
    with pytest.raises(RuntimeError, match="out of tokens"), placed_on(module, second):
        assert {tensor.device for tensor in [*module.parameters(), *module.buffers()]} == {second}
        assert module[1].weight is module[0].weight and type(module[0].weight) is nn.Parameter
        raise RuntimeError("out of tokens")
    assert held(module) == before


def test_a_replaced_method_gives_way_to_what_was_there_before():
    module = nn.Linear(2, 2, bias=False)
    with replaced(module, "forward", lambda call, x: call(x) + 1):
        with replaced(module, "forward", lambda call, x: 10 * call(x)):
            torch.testing.assert_close(module(torch.zeros(1, 2)), torch.full((1, 2), 10.0))
        torch.testing.assert_close(module(torch.zeros(1, 2)), torch.full((1, 2), 1.0))
    assert "forward" not in vars(module)


def test_sampling_leaves_the_shared_pipeline_as_it_was(second, model, pipe):
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    model.step_inputs(1)  # diffusers hangs a registry of its own on a transformer when it is first called
    before = vars(pipe) | {name: (held(part), set(vars(part))) for name, part in modules.items()}
    drawn = model.adapter.sample(
        pipe, float_copy(model.target(), dtype=torch.float32, device=second), wanted("a"), SAMPLER
    )
    model.step_inputs(1, second)
    assert drawn.latents.device == drawn.pixels.device == second
    assert vars(pipe) | {name: (held(part), set(vars(part))) for name, part in modules.items()} == before
    assert pipe._execution_device == pipe.device == CPU


def test_one_part_is_on_the_device_at_a_time(second, model, pipe):
    there = []

    def look(call, *args, **kwargs):
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        there.append([name for name, part in modules.items() if next(part.parameters()).device == second])
        return call(*args, **kwargs)

    transformer = float_copy(model.target(), dtype=torch.float32, device=second)
    with (
        replaced(pipe.text_encoder, "forward", look),
        replaced(pipe.text_encoder_2, "forward", look),
        replaced(pipe.vae, "decode", look),
        replaced(transformer, "forward", look),
    ):
        model.adapter.sample(pipe, transformer, wanted("a"), SAMPLER)
    assert there == [["text_encoder"], ["text_encoder_2"], [], [], ["vae"]]


def reads(model, pipe, *samplings) -> int:
    """How often the second text encoder is called, beside the trial of how rows lie."""
    seen = []

    def counted(call, input_ids, *args, **kwargs):
        seen.append(input_ids)
        return call(input_ids, *args, **kwargs)

    trial = pipe.tokenizer_2(list(PAIR), padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with replaced(pipe.text_encoder_2, "forward", counted):
        for texts, guidance in samplings:
            transformer = float_copy(model.target(), dtype=torch.float32)
            model.adapter.sample(pipe, transformer, wanted(*texts), Sampler("pipeline", 1, guidance), decode=False)
    return sum(not any(torch.equal(ids[0], each) for each in trial.input_ids) for ids in seen)


def test_a_prompt_is_read_once_in_a_sweep_whatever_stands_beside_it(model, pipe):
    assert reads(model, pipe, ("ab", 2.0), ("ab", 2.0), ("ba", 2.0), ("a", 2.0), ("aab", 2.0)) == 2
    assert reads(model, pipe, ("ab", 2.0)) == 0
    forget_prompts(pipe)
    assert reads(model, pipe, ("ab", 2.0)) == 2


def test_other_prompts_or_another_guidance_are_read_anew(model, pipe):
    assert reads(model, pipe, ("ab", 2.0), ("cb", 2.0), ("ab", 3.0)) == 5


def test_what_is_more_than_may_be_kept_is_read_again_and_draws_the_same(model, pipe, monkeypatch):
    monkeypatch.setattr(encoded_prompts, "KEPT_BYTES", 3000)  # one sample's: 16 tokens 24 wide, and 16 pooled numbers
    assert reads(model, pipe, ("a", 2.0), ("b", 2.0), ("a", 2.0), ("b", 2.0)) == 3
    transformer = float_copy(model.target(), dtype=torch.float32)
    kept, again = (model.adapter.sample(pipe, transformer, wanted("b"), SAMPLER).latents for _ in range(2))
    assert torch.equal(kept, again)


def test_whoever_changes_what_was_read_does_not_change_what_is_kept(model, pipe):
    given = {"prompt": "a", "prompt_2": "a", "device": CPU, "max_sequence_length": 16}
    with running_on(pipe, CPU) as running:
        first = running.encode_prompt(**given)[0]
        expected = first.clone()
        first.zero_()
        running.encode_prompt(**given)[0].zero_()
        assert torch.equal(running.encode_prompt(**given)[0], expected)
