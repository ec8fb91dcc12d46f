"""Aligned columns that fit, and how wide that is."""

from __future__ import annotations

import os
import sys

import pytest

from ditbench.harness.common import terminal
from ditbench.harness.common.text_table import table

LONG = "a sentence of many words that goes on and on, so that no terminal has room for it in one line of a cell"


def test_a_table_that_fits_is_padded_to_its_widest_cells():
    assert table(("name", "what"), [("a", 1), ("longer", "x")]) == "name    what\na       1\nlonger  x"


@pytest.mark.parametrize("width", [60, 80])
def test_what_does_not_fit_goes_on_in_its_column(width):
    lines = table(("name", "what"), [("one_name_that_stays_whole", LONG), ("b", "c")], width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 3
    assert lines[1].startswith("one_name_that_stays_whole  a sentence")
    assert {line[:27].strip() for line in lines[2:-1]} <= {""}
    assert " ".join(line[27:] for line in lines[1:-1]) == LONG


def test_names_and_numbers_stay_whole_while_sentences_have_room_to_give_way():
    row = ("a_long_name_of_something", "1234567890.123456", LONG, "owner/another-long-name")
    lines = table(("a", "b", "c", "d"), [row], 90).splitlines()
    assert max(map(len, lines)) <= 90
    assert row[1] in lines[1] and row[3] in lines[1]
    narrow = table(("a", "b"), [("x" * 70, "y" * 70)], 80)
    assert narrow.count("x") == narrow.count("y") == 70, "folded and not cut off"


def test_an_indent_counts_among_the_width():
    lines = table(("name", "what"), [("a", LONG)], 60, indent=4).splitlines()
    assert max(map(len, lines)) <= 60 and all(line.startswith("    ") for line in lines)


def test_words_of_others_are_no_markup():
    assert "[bold]x[/bold] :smile: [1, 2]" in table(("a", "b"), [("c", "[bold]x[/bold] :smile: [1, 2]")])


def test_piped_output_is_120_columns_wide_and_a_terminal_says_its_own(monkeypatch):
    assert terminal.columns() == 120, "stdout is captured here"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for said, width in ((200, 200), (80, 80), (20, 60)):
        monkeypatch.setattr(
            terminal.shutil, "get_terminal_size", lambda fallback, said=said: os.terminal_size((said, 24))
        )
        assert terminal.columns() == width
        assert max(map(len, terminal.wrapped(f"  {LONG * 4}").splitlines())) <= min(width, 120)
