"""How a mistake ends: with --debug in a traceback and the same exit code; where names are cut off, it is said what lists them all."""

from __future__ import annotations

from outcomes import REFUSED, process

from ditbench.harness.common.errors import MOST_NAMED, unknown_name


def test_debug_prints_the_traceback_of_a_mistake_and_exits_as_without_it(tmp_path):
    done = process("report", "--results-dir", str(tmp_path), "--debug")
    assert done.code == REFUSED and "Traceback" in done.err and "no record to report" in done.err


def test_names_that_are_cut_off_come_with_the_command_that_lists_them():
    many = [f"m{place}" for place in range(MOST_NAMED + 5)]
    assert str(unknown_name("model", "x", many)).endswith("… (29 in all; `ditbench list models` has all)")
    assert str(unknown_name("layer", "x", many)).endswith("… (29 in all)")
