"""The sets of prompts that ship: always the same, with what the metrics ask of them."""

from __future__ import annotations

import pytest

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.zoo.shapes import DIRECTIONS, KINDS
from ditbench.harness.stages.prompt_sets import SETS, load_prompts


@pytest.mark.parametrize("name", [name for name, each in SETS.items() if each.needs is None])
def test_a_set_is_the_same_each_time_and_has_words_and_truth(name):
    prompts = load_prompts(name)
    load_prompts.cache_clear()
    assert load_prompts(name) == prompts and len(prompts) == 240
    wanted = {"tag", "include"} | ({"direction", "speed", "scene"} if "video" in name else set())
    assert all(prompt.text and wanted <= set(prompt.about) for prompt in prompts)


def test_every_kind_and_direction_is_there_among_the_first():
    assert {prompt.about["tag"] for prompt in load_prompts("shapes")[:6]} == set(KINDS)
    assert {prompt.about["direction"] for prompt in load_prompts("shapes-video")[:4]} == set(DIRECTIONS)


@pytest.mark.parametrize("name", ["shapes", "shapes-video"])
def test_calibration_draws_other_captions_where_there_are_many(name):
    scored, drawn = ({prompt.text for prompt in load_prompts(each)[:60]} for each in (name, f"{name}-calibration"))
    assert scored != drawn and len(scored - drawn) > 30


def test_a_file_is_read_and_an_unknown_set_guessed_at(tmp_path):
    (tmp_path / "mine.txt").write_text("a fox\na hen\n")
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "mine.txt"))] == ["a fox", "a hen"]
    with pytest.raises(UserError, match="no prompt set"):
        load_prompts("shape")
