"""The list of mutants follows the code: `python bench/mutants.py` makes them and runs the tests that see them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("bench_mutants", ROOT / "bench" / "mutants.py")
bench = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


def test_every_mutant_changes_a_text_that_stands_once_and_leaves_python():
    for number, mutant in enumerate(bench.mutants(), 1):
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        changed = mutant.changed(source)
        assert changed != source and (not mutant.file.endswith(".py") or ast.parse(changed)), number


def test_every_mutant_says_what_it_breaks_and_names_tests_that_are_there():
    for number, mutant in enumerate(bench.mutants(), 1):
        assert mutant.breaks and mutant.tests, number
        assert all((ROOT / test.split("::")[0]).is_file() for test in mutant.tests), number


def test_there_are_fifty_mutants_or_more_in_many_files_and_none_twice():
    mutants = bench.mutants()
    of_rooms = Counter(mutant.file.split("/")[0] for mutant in mutants)
    assert len(mutants) >= 50 and all(of_rooms[room] >= 10 for room in ("eval", "harness", "methods"))
    assert len({(mutant.file, mutant.text, mutant.becomes) for mutant in mutants}) == len(mutants)


def test_a_text_that_is_gone_or_stands_twice_is_said():
    mutant = bench.Mutant("eval/x.py", "a + b", "a - b", "the sign", ("tests/eval/test_x.py",))
    assert mutant.changed("c = a + b\n") == "c = a - b\n"
    for source in ("c = a\n", "c = a + b\nd = a + b\n"):
        with pytest.raises(ValueError, match=r"expected 'a \+ b' once in eval/x\.py"):
            mutant.changed(source)


@pytest.mark.parametrize(("condition", "outcome"), [("x == 3", bench.KILLED), ("x > 0", bench.SURVIVED)])
def test_a_mutant_is_killed_by_a_test_that_fails_and_the_file_is_put_back(condition, outcome, tmp_path):
    (tmp_path / "sums.py").write_text("x = 1 + 2\n")
    (tmp_path / "test_sums.py").write_text(f"from sums import x\n\n\ndef test_x():\n    assert {condition}\n")
    mutant = bench.Mutant("sums.py", "1 + 2", "1 * 2", "the sum", ("test_sums.py",))
    assert bench.outcome_of(mutant, tmp_path) == outcome
    assert (tmp_path / "sums.py").read_text() == "x = 1 + 2\n"


def test_tests_that_cannot_run_kill_nothing(tmp_path):
    (tmp_path / "sums.py").write_text("x = 1 + 2\n")
    (tmp_path / "test_sums.py").write_text("import no_such_module\n")
    mutant = bench.Mutant("sums.py", "1 + 2", "1 * 2", "the sum", ("test_sums.py",))
    assert bench.outcome_of(mutant, tmp_path) == bench.NOT_RUN
