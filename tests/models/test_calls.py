"""A transformer's arguments are taken apart into rows and the rest, and put together as they were."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.calls import (
    Call,
    Shape,
    count_rows,
    float_dtype,
    placed,
    row_dims,
    side_by_side,
    take_apart,
)


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
    rows, shape = take_apart(arguments(), rows=4, dims={"image_rotary_emb": None})
    assert same(shape.arguments(rows), arguments())
    stored = replace(shape, tree=json.loads(json.dumps(shape.tree)))
    assert same(stored.arguments(rows), arguments())


def test_rows_are_what_is_as_long_as_the_batch_and_not_said_to_be_shared():
    rows, shape = take_apart(arguments(), rows=4, dims={"image_rotary_emb": None})
    assert set(rows) == {"hidden_states", "timestep", "mask", "added/sizes/0"}
    assert set(shape.shared) == {"image_rotary_emb/0", "image_rotary_emb/1", "scale"}
    assert "image_rotary_emb/0" in take_apart(arguments(), rows=4)[0], "as long as the batch by chance"


def test_some_rows_are_put_among_the_same_rest():
    rows, shape = take_apart(arguments(), rows=4, dims={"image_rotary_emb": None})
    some = shape.arguments({name: tensor[1:3] for name, tensor in rows.items()})
    assert some["hidden_states"].tolist() == [[2, 3], [4, 5]] and some["added"]["sizes"][0].tolist() == [1, 2]
    assert some["image_rotary_emb"][1].shape == (5, 3)


def call_on(samples: int, *, guided: bool = False, tokens: int = 3) -> dict:
    """A call with rows in every way they come in: in the first dimension, in the second, in lists, and not at all."""
    rows = 2 * samples if guided else samples
    return {
        "x": [torch.full((1, 4, 4), float(row)) for row in range(rows)],
        "captions": [torch.full((tokens + row, 5), float(row)) for row in range(rows)],
        "t": torch.arange(rows, dtype=torch.float32),
        "layers": torch.arange(7.0)[:, None, None] + torch.arange(float(rows))[None, :, None],
        "sizes": [[(1, 4, 4)] for _ in range(rows)],
        "positions": (torch.ones(2, 3), torch.zeros(rows, 2)),
        "mask": None,
    }


def test_rows_lie_along_what_grows_with_the_samples():
    """FEW and MORE are 2 and 3: as long as the batch by chance are the tables of 2 and 3 positions, and grow they do not."""
    found = row_dims(call_on(2), call_on(3), {})
    assert found == {
        "x": 0, "captions": 0, "t": 0, "layers": 1, "sizes": 0, "positions/0": None, "positions/1": 0,
    }  # fmt: skip
    assert row_dims(call_on(2, guided=True), call_on(3, guided=True), {}) == found
    assert count_rows(call_on(5, guided=True), found) == 10


def test_what_the_family_says_is_not_looked_at():
    grown = {"cumulated": torch.arange(3)}, {"cumulated": torch.arange(4)}
    with pytest.raises(UserError, match=r"cumulated of the transformer is \(3,\) for 2 samples and \(4,\) for 3"):
        row_dims(*grown, {})
    assert row_dims(*grown, {"cumulated": None}) == {"cumulated": None}
    with pytest.raises(UserError, match="no row per sample"):
        row_dims({"both": torch.ones(2, 2)}, {"both": torch.ones(3, 3)}, {})


def test_rows_in_any_dimension_and_in_lists_are_taken_apart_and_put_together_again():
    dims = row_dims(call_on(2), call_on(3), {})
    call = Call(*take_apart(call_on(4), 4, dims))
    assert call.num_rows == 4 and call["layers"].shape == (4, 7, 1) and len(call["captions"]) == 4
    assert same(call.arguments(), call_on(4))
    assert same(replace(call.shape, tree=json.loads(json.dumps(call.shape.tree))).arguments(call.rows), call_on(4))


def test_picked_rows_keep_what_belongs_to_each():
    call = Call(*take_apart(call_on(4), 4, row_dims(call_on(2), call_on(3), {})))
    for kept in (torch.tensor([3, 1]), slice(1, 3)):
        rows = [3, 1] if isinstance(kept, Tensor) else [1, 2]
        some = call.pick(kept).arguments()
        assert some["t"].tolist() == rows and [float(x[0, 0, 0]) for x in some["x"]] == rows
        assert [len(caption) for caption in some["captions"]] == [3 + row for row in rows]
        assert some["layers"].shape == (7, 2, 1) and some["layers"][0, :, 0].tolist() == rows
        assert some["sizes"] == [[(1, 4, 4)]] * 2
        assert some["positions"][0].shape == (2, 3) and some["positions"][1].shape == (2, 2)


def test_calls_are_put_side_by_side_if_nothing_but_their_rows_differs():
    dims = row_dims(call_on(2), call_on(3), {})
    one, other = (
        Call(*take_apart(call_on(samples, tokens=tokens), samples, dims)) for samples, tokens in ((2, 3), (3, 8))
    )
    assert one.is_like(other), "lists of one tensor per row may differ in their shapes"
    both = side_by_side([one, other])
    assert both.num_rows == 5 and [len(caption) for caption in both["captions"]] == [3, 4, 8, 9, 10]
    tables = [
        Call({"x": torch.ones(2, size)}, Shape({"dict": {"x": {"rows": ["x", 0]}, "p": {"shared": "p"}}}, {"p": table}))
        for size, table in ((4, torch.ones(3)), (4, torch.ones(3)), (5, torch.ones(3)), (4, torch.zeros(3)))
    ]
    assert [tables[0].is_like(each) for each in tables] == [True, True, False, False]


def test_a_list_with_an_entry_per_sample_that_is_no_row_is_named():
    dims = row_dims({"sizes": [1, 2]}, {"sizes": [1, 2, 3]}, {})
    with pytest.raises(UserError, match="sizes of the transformer: a list with an entry per sample"):
        take_apart({"sizes": [1, 2, 3, 4]}, 4, dims)


def test_arguments_that_disagree_on_the_number_of_rows_are_named():
    with pytest.raises(UserError, match="By argument: a: 4, b: 2; its family has to say"):
        count_rows({"a": torch.ones(4), "b": torch.ones(2)}, {"a": 0, "b": 0})
    with pytest.raises(UserError, match="By argument: none"):
        count_rows({"a": torch.ones(4)}, {})


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


def test_codes_that_another_library_wraps_do_not_say_a_models_dtype():
    """They keep the dtype that they were quantized in, whatever the rest was loaded in."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    codes = torch.zeros(8, 8)
    model[0].weight = nn.Parameter(TwoTensor(codes, codes.clone()), requires_grad=False)
    assert model[0].weight.dtype == torch.float32
    assert float_dtype(model) == torch.bfloat16
