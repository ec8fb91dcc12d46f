"""What a message shows in quotes is what the user meant, once a shell and Hydra have read it."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ditbench.harness.sweep.overrides import in_quotes

VALUES = [
    "a=b",
    "a#b.txt",
    "提示/a.txt",
    "a(b),c",
    "it's.txt",
    'say "hi"',
    "$HOME/a",
    "a\\b",
    "a\\'b",
    "`x`!",
    "[a",
    "a  b;&|<>*?",
]


@pytest.mark.parametrize("value", VALUES)
def test_the_quoted_form_reads_as_the_value(value):
    shown = in_quotes(f"protocol.prompts={value}")
    (argument,) = shlex.split(shown.partition("in quotes: ")[2])
    read = OverridesParser.create().parse_override(argument)
    assert (read.key_or_group, read.value()) == ("protocol.prompts", value)


@pytest.mark.parametrize("text", ["protocol.n", "=3", "a b=[c", "protocol.n=", "protocol.n='a"])
def test_nothing_is_shown_where_quotes_do_not_help(text):
    assert in_quotes(text) == ""
