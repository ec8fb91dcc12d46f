"""Prompts are encoded once per distinct prompt, kept on disk by all that made them, and come back as whole calls give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditbench.harness.common import placement
from ditbench.harness.models import encoded_prompts
from ditbench.harness.models.encoded_prompts import KIND, TENSORS, encoding_once, forget_prompts, keeping

CPU = torch.device("cpu")
TEXTS = ["one", "two words", "three of them", "and once more four"]


class Reader(nn.Module):
    """Each letter a vector, and what it knows of those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(128, 6)
        self.calls: list[list[str]] = []

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.table(ids_BT).cumsum(1)


class Pipe:
    """A pipeline as diffusers makes them, as far as prompts go. pads: "max_length" | "longest"; gives: "tensors" | "lists" | "objects"."""

    def __init__(self, pads: str = "max_length", gives: str = "tensors") -> None:
        self.text_encoder, self.pads, self.gives = Reader(), pads, gives
        self.guidance_scale = 2.0

    @property
    def components(self):
        return {"text_encoder": self.text_encoder, "transformer": nn.Linear(1, 1), "tokenizer": None}

    def encode_prompt(self, prompt, prompt_2=None, negative_prompt=None, length=24, device=None, **more):
        self.text_encoder.calls.append(prompt)
        other = prompt_2 or prompt
        rows = [f"{text}|{second}"[:length] for text, second in zip(prompt, other, strict=True)]
        wide = length if self.pads == "max_length" else max(map(len, rows))
        ids = torch.tensor([[ord(letter) for letter in row.ljust(wide)] for row in rows], device=device)
        states = self.text_encoder(ids)
        if self.gives == "lists":
            return [state[: len(row)] for state, row in zip(states, rows, strict=True)], None
        if self.gives == "objects":
            return states, object()
        return states, ids.ne(32), None, {"positions": torch.arange(wide)[:, None], "kind": "text"}


def asks(pipe: Pipe, device: torch.device = CPU):
    return encoding_once(pipe, pipe, device)


def same(found, expected) -> bool:
    flat = torch.utils._pytree.tree_flatten
    (ours, tree), (theirs, other) = flat(found), flat(expected)
    return tree == other and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def kept_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / KIND).glob("[!.]*")}


def test_a_batch_comes_back_as_a_whole_call_gives_it_and_no_prompt_is_read_twice(tmp_path):
    pipe = Pipe()
    expected = pipe.encode_prompt(["two words", "one", "two words"], device=CPU)
    with keeping(pipe, [], tmp_path):
        assert same(asks(pipe)(["two words", "one", "two words"], device=CPU), expected)
        pipe.text_encoder.calls.clear()
        assert same(asks(pipe)(prompt=["one", "two words"], device=CPU), Pipe().encode_prompt(["one", "two words"]))
    assert pipe.text_encoder.calls == []


def test_another_process_reads_what_one_has_left(tmp_path):
    first, second = Pipe(), Pipe()
    with keeping(first, [], tmp_path):
        expected = asks(first)(TEXTS, length=30)
    with keeping(second, [], tmp_path):
        assert same(asks(second)(TEXTS, length=30), expected)
    assert second.text_encoder.calls == []


def test_all_prompts_of_a_run_are_encoded_when_the_first_is_asked_for(tmp_path):
    pipe = Pipe()
    with keeping(pipe, [*TEXTS, *TEXTS], tmp_path):
        asks(pipe)(TEXTS[:2])
        assert sorted(pipe.text_encoder.calls[3:]) == sorted([text] for text in TEXTS)  # behind the trial
        pipe.text_encoder.calls.clear()
        for start in range(3):
            asks(pipe)(TEXTS[start : start + 2], negative_prompt=None)
    assert pipe.text_encoder.calls == []


def test_while_they_are_encoded_the_encoder_is_on_the_device_once_if_it_fits(second, tmp_path, monkeypatch):
    placings = []

    def noted(module, device):
        placings.append(type(module).__name__)
        return placement.placed_on(module, device)

    monkeypatch.setattr(encoded_prompts, "placed_on", noted)
    pipe = Pipe()
    with keeping(pipe, TEXTS, tmp_path):
        found = asks(pipe, second)([TEXTS[0]], device=second)
    assert placings == ["Reader"] and len(pipe.text_encoder.calls) == 4
    assert {tensor.device for tensor in torch.utils._pytree.tree_leaves(found) if isinstance(tensor, Tensor)} == {
        second
    }
    assert pipe.text_encoder.table.weight.device == CPU
    monkeypatch.setattr(encoded_prompts, "free_memory", lambda device: 100)
    asked = encoded_prompts._Asked(encoded_prompts._shelves[pipe], pipe, pipe, pipe.encode_prompt, second)
    assert asked.encoders_that_fit() == []


@pytest.mark.parametrize("settings", [{"pads": "longest"}, {"gives": "lists"}], ids=str)
def test_where_a_prompt_depends_on_its_neighbours_or_a_list_comes_whole_calls_are_kept(settings, tmp_path):
    pipe = Pipe(**settings)
    expected = pipe.encode_prompt(["one", "two words"])
    with keeping(pipe, TEXTS, tmp_path):
        assert same(asks(pipe)(["one", "two words"]), expected)
        pipe.text_encoder.calls.clear()
        assert same(asks(pipe)(["one", "two words"]), expected) and pipe.text_encoder.calls == []
        asks(pipe)(["one", "three of them"])
    assert pipe.text_encoder.calls == [["one", "three of them"]]


def test_what_cannot_be_written_is_given_as_it_is(tmp_path):
    pipe = Pipe(gives="objects")
    with keeping(pipe, [], tmp_path):
        assert type(asks(pipe)(["one"])[1]) is object
    assert kept_in(tmp_path) == set()


def test_tensors_among_the_arguments_are_not_kept(tmp_path):
    pipe = Pipe()
    with keeping(pipe, [], tmp_path):
        asks(pipe)(["one"], image=torch.zeros(2))
    assert kept_in(tmp_path) == set()


def test_the_key_is_of_all_that_makes_an_embedding_and_of_nothing_else(tmp_path):
    def key(pipe: Pipe, **given) -> str:
        shelf = encoded_prompts.Shelf()
        asked = encoded_prompts._Asked(shelf, pipe, pipe, pipe.encode_prompt, given.pop("on", CPU))
        return asked.key({"prompt": ["one"], "length": 24, "device": CPU} | given)

    other, guided = Pipe(), Pipe()
    other.text_encoder.table.weight.data[3] += 1
    guided.guidance_scale = 1.0
    changed = [
        key(Pipe(), prompt=["two"]), key(Pipe(), length=8), key(Pipe(), negative_prompt=["no"]), key(other), key(guided),
        key(Pipe(), on=torch.device("meta")),
    ]  # fmt: skip
    assert len({key(Pipe()), *changed}) == 1 + len(changed)
    assert key(Pipe()) == key(Pipe())


def test_a_damaged_embedding_is_named_and_made_again(tmp_path, capsys):
    pipe = Pipe()
    with keeping(pipe, [], tmp_path):
        expected = asks(pipe)(["one"])
        (path,) = (tmp_path / KIND).glob(f"*/{TENSORS}")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert same(asks(pipe)(["one"]), expected)
    assert str(path) in capsys.readouterr().err and pipe.text_encoder.calls == [["one"], ["one"]]


def test_without_a_cache_what_is_kept_is_bounded_and_forgotten_on_request(monkeypatch):
    monkeypatch.setattr(encoded_prompts, "KEPT_BYTES", 1000)  # of one prompt: 24 · 6 · 4 and 24 + 24 · 8 bytes
    pipe = Pipe()
    for texts in (["one"], ["two"], ["one"], ["two"]):
        asks(pipe)(texts)
    assert pipe.text_encoder.calls == [["one"], ["two"], ["two"]]
    forget_prompts(pipe)
    asks(pipe)(["one"])
    assert pipe.text_encoder.calls[-1] == ["one"]


def test_whoever_changes_what_came_does_not_change_what_is_kept():
    pipe = Pipe()
    expected = asks(pipe)(["one"])[0].clone()
    asks(pipe)(["one"])[0].zero_()
    assert torch.equal(asks(pipe)(["one"])[0], expected)
