"""`ditbench data list | fetch | verify`, without a network."""

from __future__ import annotations

import pytest

from ditbench.eval.data import find_data, known_data


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path))
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    return tmp_path


def put(name: str, content: bytes) -> None:
    path = find_data(name).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_the_list_names_every_entry_its_licence_and_the_folder(ditbench, folder):
    said = ditbench("data", "list").out
    for name, data in known_data().items():
        assert name in said and data.licence.split()[0][:12] in said, "a longer one is wrapped in its cell"
    assert str(folder) in said


def test_the_list_says_what_is_here(ditbench):
    def row():
        return next(line for line in ditbench("data", "list").out.splitlines() if line.startswith("geneval "))

    assert " here " not in row()
    put("geneval", b"{}")
    assert " here " in row()


def test_fetching_without_a_network_is_two_lines_and_code_2(ditbench):
    outcome = ditbench("data", "fetch", "geneval")
    assert outcome.code == 2 and len(outcome.error_lines) == 2
    assert "switched off" in outcome.err and "curl -L" in outcome.err


@pytest.mark.parametrize(("arguments", "said"), [((), "data list"), (("genval",), "did you mean 'geneval'")])
def test_fetching_nothing_or_something_unknown_is_answered_in_one_line(ditbench, arguments, said):
    outcome = ditbench("data", "fetch", *arguments)
    assert outcome.code == 2 and said in outcome.err and len(outcome.error_lines) == 1


def test_verify_goes_through_everything_and_missing_files_are_no_failure(ditbench):
    outcome = ditbench("data", "verify")
    assert outcome.code == 0
    assert all(name in outcome.out for name in known_data())


def test_verify_prints_your_hash_where_none_is_published_and_fails_where_it_differs(ditbench):
    put("geneval", b"{}")
    good = ditbench("data", "verify", "geneval")
    assert good.code == 0 and "no published hash; yours is 44136fa355b3678a" in good.out
    put("lpips-alex", b"not AlexNet")
    bad = ditbench("data", "verify", "lpips-alex")
    assert bad.code == 2 and "BAD" in bad.out and "7be5be79" in bad.out
    assert ditbench("data", "verify").code == 2


def test_the_doctor_counts_what_is_here(ditbench):
    put("sdci", b"a: b")
    assert "sdci here" in ditbench("doctor").out
