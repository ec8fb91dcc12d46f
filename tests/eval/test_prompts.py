import json
import tracemalloc

import pytest

from ditbench.eval.prompts import load_prompts
from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.samples import Prompt


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_a_text_file_has_one_prompt_per_line_and_empty_lines_count_for_nothing(tmp_path):
    path = written(tmp_path, "a.txt", "a red cat\n\n  ein Hund, größer  \n")
    assert load_prompts(path) == (Prompt("a red cat"), Prompt("ein Hund, größer"))


def test_genevals_json_lines_keep_tag_and_include(tmp_path):
    line = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    path = written(tmp_path, "evaluation_metadata.jsonl", json.dumps(line) + "\n" + '{"text": "a dog"}\n')
    prompts = load_prompts(path)
    assert prompts[0] == Prompt("two cats", {"tag": "counting", "include": [{"class": "cat", "count": 2}]})
    assert prompts[1] == Prompt("a dog")


def test_vbenchs_list_keeps_dimensions_and_the_auxiliary_information(tmp_path):
    content = [
        {"prompt_en": "a cat runs", "dimension": ["subject_consistency"]},
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    ]
    prompts = load_prompts(written(tmp_path, "VBench_full_info.json", json.dumps(content)))
    assert [prompt.text for prompt in prompts] == ["a cat runs", "a red car"]
    assert prompts[1].about == {"dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}}


def test_mjhqs_mapping_keeps_its_ids_and_categories(tmp_path):
    path = written(tmp_path, "meta_data.json", '{"7f3": {"category": "food", "prompt": "bread"}, "a": {"prompt": "b"}}')
    assert load_prompts(path) == (Prompt("bread", {"id": "7f3", "category": "food"}), Prompt("b", {"id": "a"}))


def test_sdcis_yaml_maps_ids_to_prompts(tmp_path):
    path = written(tmp_path, "sDCI.yaml", "sa_1: A street.\nsa_2: 'Two: cats'\n")
    assert load_prompts(path) == (Prompt("A street.", {"id": "sa_1"}), Prompt("Two: cats", {"id": "sa_2"}))


def test_cocos_table_takes_the_caption_and_keeps_the_other_columns(tmp_path):
    path = written(tmp_path, "captions.tsv", 'id\timage_id\tcaption\n5\t9\tA man, a "plan".\n6\t8\t"Quoted\tcell"\n')
    prompts = load_prompts(path)
    assert prompts[0] == Prompt('A man, a "plan".', {"id": "5", "image_id": "9"})
    assert prompts[1].text == "Quoted\tcell"


def test_a_line_separator_within_a_json_line_does_not_end_it(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"prompt": "one\u2028two"}\n{"prompt": "three"}\n')
    assert [prompt.text for prompt in load_prompts(path)] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "a.jsonl, line 3: expected a JSON object"),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', "line 2: expected a field .* came the fields tag"),
        ("a.jsonl", "3\n", "line 1: expected a field .* came int"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: expected text in prompt, came int"),
        ("a.json", '[\n{"prompt": "a"},\n}', "a.json, line 3: expected JSON"),
        ("a.json", '[{"prompt": "a"}, {"dimension": "b"}]', "entry 2: expected a field"),
        ("a.json", '{"x": {"category": "b"}}', "entry 'x': expected a field"),
        ("a.json", '"just text"', "expected a list or a mapping of prompts, came str"),
        ("a.yaml", "a: b\nc: [d\n", "a.yaml, line 3: expected YAML"),
        ("a.tsv", "id\tcaption\n1\ta\n2\t\n", "a.tsv, line 3: expected a field .* came the fields id, caption"),
        ("a.txt", "\n \n", "expected prompts, came none"),
        ("a.csv", "a", r"expected a prompt file \(.txt, .jsonl, .json, .yaml, .tsv\), came .csv"),
    ],
)
def test_a_broken_file_says_where_and_what_was_expected(name, content, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load_prompts(written(tmp_path, name, content))


def test_a_file_that_is_not_text_says_so(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff")
    with pytest.raises(UserError, match="expected text in UTF-8, came .* at byte 3"):
        load_prompts(tmp_path / "a.txt")


def test_a_set_that_was_fetched_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path))
    with pytest.raises(UserError, match="geneval is not here; `ditbench data fetch geneval`"):
        load_prompts("geneval")
    (tmp_path / "prompts").mkdir()
    written(tmp_path / "prompts", "geneval.jsonl", '{"prompt": "a cat"}')
    assert load_prompts("geneval") == (Prompt("a cat"),)


def test_a_misspelt_name_is_answered_with_the_nearest_and_a_missing_path_with_what_is_known(tmp_path):
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        load_prompts("genval")
    with pytest.raises(UserError, match="no such file; .*geneval"):
        load_prompts(tmp_path / "missing.txt")


TWO_FORMS = {
    "a.txt": "a fox\n\na hen\n{rest}",
    "a.jsonl": '{"prompt": "a fox"}\n\n{"prompt": "a hen"}\n{rest}',
    "a.json": '["a fox", {"text": "a hen"}, {rest}',
    "named.json": '{"1": "a fox", "2": {"prompt": "a hen"}, {rest}',
    "a.yaml": "1: a fox\n2: {text: a hen}\n{rest}",
    "list.yaml": "- a fox\n- a hen\n{rest}",
    "a.tsv": "caption\na fox\na hen\na cell\tmore {rest}",
}


@pytest.mark.parametrize("name", TWO_FORMS)
def test_a_file_is_read_as_far_as_prompts_are_asked_for(tmp_path, name):
    """What comes behind is no prompt in any of them but .txt."""
    path = written(tmp_path, name, TWO_FORMS[name].replace("{rest}", "[[{"))
    assert [prompt.text for prompt in load_prompts(path, most=2)] == ["a fox", "a hen"]
    if path.suffix != ".txt":
        with pytest.raises(UserError, match=name):
            load_prompts(path)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "tsv", "yaml"])
def test_two_prompts_of_a_large_file_hold_little(tmp_path, ending):
    lines = {"txt": "a fox {}", "jsonl": '{{"prompt": "a fox {}"}}', "tsv": "{}\ta fox", "yaml": "{}: a fox"}
    head = "id\tcaption\n" if ending == "tsv" else ""
    path = written(tmp_path, f"a.{ending}", head + "\n".join(lines[ending].format(n) for n in range(200_000)))
    tracemalloc.start()
    prompts = load_prompts(path, most=2)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts) == 2 and held < 2**20 < path.stat().st_size


def test_json_is_read_entry_by_entry_as_the_library_reads_it_whole(tmp_path):
    content = {"a": {"prompt": 'a \u20ac, "b"]', "n": [1.5, None, {"x": "}"}]}, "é": "two\tcats", "": "c"}
    for separators in ((",", ":"), (" ,\n ", "\t: ")):
        path = written(tmp_path, "a.json", f" \n{json.dumps(content, separators=separators)}\n ")
        prompts = load_prompts(path)
        assert [prompt.about["id"] for prompt in prompts] == ["a", "é", ""]
        assert prompts[0] == Prompt('a €, "b"]', {"id": "a", "n": [1.5, None, {"x": "}"}]})
        assert prompts[1].text == "two\tcats"


@pytest.mark.parametrize(
    "content", ['["a",]', '["a" "b"]', '["a"] x', '{"a" "b"}', '{1: "b"}', '{"a": "b",}', "[", "{"]
)
def test_what_is_no_json_is_refused_wherever_it_breaks(tmp_path, content):
    with pytest.raises(UserError, match="line 1: expected JSON"):
        load_prompts(written(tmp_path, "a.json", content))
