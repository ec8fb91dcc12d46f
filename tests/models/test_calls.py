"""A transformer's arguments are taken apart into rows and the rest, and put together as they were."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.calls import float_dtype, placed, take_apart


def arguments() -> dict:
    return {
        "hidden_states": torch.arange(8.0).reshape(4, 2),
        "timestep": torch.tensor([999.0, 999.0, 999.0, 999.0]),
        "mask": torch.tensor([[True, False]] * 4),
        "image_rotary_emb": (torch.ones(4, 3), torch.zeros(5, 3)),
        "added": {"resolution": None, "sizes": [torch.arange(4), 7]},
        "scale": torch.tensor(2.0),
        "flag": True,
        "name": "x",
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_what_was_taken_apart_is_put_together_again_also_after_json():
    rows, shape = take_apart(arguments(), rows=4, shared_names=("image_rotary_emb",))
    assert same(shape.arguments(rows), arguments())
    stored = replace(shape, tree=json.loads(json.dumps(shape.tree)))
    assert same(stored.arguments(rows), arguments())


def test_rows_are_what_is_as_long_as_the_batch_and_not_said_to_be_shared():
    rows, shape = take_apart(arguments(), rows=4, shared_names=("image_rotary_emb",))
    assert set(rows) == {"hidden_states", "timestep", "mask", "added/sizes/0"}
    assert set(shape.shared) == {"image_rotary_emb/0", "image_rotary_emb/1", "scale"}
    assert "image_rotary_emb/0" in take_apart(arguments(), rows=4)[0], "as long as the batch by chance"


def test_some_rows_are_put_among_the_same_rest():
    rows, shape = take_apart(arguments(), rows=4, shared_names=("image_rotary_emb",))
    some = shape.arguments({name: tensor[1:3] for name, tensor in rows.items()})
    assert some["hidden_states"].tolist() == [[2, 3], [4, 5]] and some["added"]["sizes"][0].tolist() == [1, 2]
    assert some["image_rotary_emb"][1].shape == (5, 3)


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(UserError, match="added/cache of the transformer, a object"):
        take_apart({"hidden_states": torch.ones(2), "added": {"cache": object()}}, rows=2)


def test_floats_are_placed_in_the_models_dtype_but_for_what_it_embeds_in_float32():
    found = placed(arguments(), torch.bfloat16, "cpu")
    assert found["hidden_states"].dtype == found["image_rotary_emb"][0].dtype == torch.bfloat16
    assert found["timestep"].dtype == torch.float32, "999 is 1000 in bfloat16"
    assert found["mask"].dtype == torch.bool and found["added"]["sizes"][0].dtype == torch.int64
    assert isinstance(found["image_rotary_emb"], tuple) and isinstance(found["added"]["sizes"], list)
    assert found["flag"] is True and found["name"] == "x"


def test_a_models_dtype_is_that_of_most_of_its_values():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4).to(torch.bfloat16), nn.LayerNorm(4))
    assert float_dtype(model) == torch.bfloat16
    assert float_dtype(nn.Identity()) == torch.float32
