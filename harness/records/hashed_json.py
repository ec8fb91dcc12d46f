"""JSON files that carry the SHA-256 of themselves: of every byte, the 64 digits of the hash (the last field) read as zeros.

Files of before have no hash and are read without.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ditbench.harness.common.files import atomic_path

FIELD = "sha256"
DEEPEST = 40  # what we write is at most 8 deep; whoever walks through it must not run out of stack
_BLANK = "0" * 64
SURROGATE = re.compile("[\ud800-\udfff]")
_LAST_FIELD = re.compile(rb'"([0-9a-f]{64})"\s*\}\s*\Z')


class NotWhole(Exception):
    """The content is not what was written, or no JSON object; the message says in what, without the file's name."""


def text_of(values: dict[str, Any]) -> str:
    """Raises TypeError, ValueError, NotWhole: values that JSON cannot hold or `read` does not take."""
    _refuse_odd(values)
    text = json.dumps(values | {FIELD: _BLANK}, indent=2, allow_nan=False) + "\n"
    before, after = text.rsplit(_BLANK, 1)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


def write(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The values, without the hash.

    Raises:
        NotWhole: not the bytes that were written; no JSON object; nested deeper than DEEPEST; numbers that are not finite.
    """
    content = path.read_bytes()
    said = _LAST_FIELD.search(content, max(len(content) - 200, 0))
    if said:
        blank = content[: said.start(1)] + _BLANK.encode() + content[said.end(1) :]
        if hashlib.sha256(blank).hexdigest() != said[1].decode():
            raise NotWhole(f"does not have the SHA-256 that it was written with; {_kind(content)}")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotWhole(str(error) if isinstance(error, ValueError) else "nested without end") from error
    if not isinstance(values, dict):
        raise NotWhole(f"expected an object with names, came {_shown(values)}")
    if not said and FIELD in values:
        raise NotWhole("its SHA-256 is none")
    values.pop(FIELD, None)
    _refuse_odd(values)
    return values


def finite(value: Any, at: str = "") -> tuple[Any, list[str]]:
    """The value with null for every number that is not finite, and where each of these stood: "layers/proj/sqnr_db: inf".

    NumPy's numbers become Python's.
    """
    if isinstance(value, np.generic):
        value = value.item()
    for plain in (str, float):  # not what is derived from them
        if isinstance(value, plain):
            value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None, [f"{at}: {value}"]
    if isinstance(value, dict):
        found = {key: finite(each, f"{at}/{key}" if at else str(key)) for key, each in value.items()}
        return {key: each for key, (each, _) in found.items()}, [w for _, where in found.values() for w in where]
    if isinstance(value, list | tuple):
        listed = [finite(each, f"{at}/{place}") for place, each in enumerate(value)]
        return [each for each, _ in listed], [w for _, where in listed for w in where]
    return value, []


def _refuse_odd(values: Any) -> None:
    """json takes NaN, Infinity and 1e999; and it nests deeper than those can follow who walk through what it gives."""
    level = [values]
    for _ in range(DEEPEST):
        below = []
        for node in level:
            for each in node.values() if isinstance(node, dict) else node:
                if isinstance(each, dict | list):
                    below.append(each)
                elif isinstance(each, float):
                    if not math.isfinite(each):
                        raise NotWhole(f"holds a number that is not finite ({each})")
                elif isinstance(each, str) and not each.isascii() and SURROGATE.search(each):
                    raise NotWhole("holds half a character, which no file can be written with")
                elif isinstance(each, int) and abs(each) > 1e300:
                    raise NotWhole("holds a number of more than 300 digits")
        level = below
        if not level:
            return
    raise NotWhole(f"nested more than {DEEPEST} deep")


def _kind(content: bytes) -> str:
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"no JSON any more ({str(error)[:80]})"
    return "some value in it is another"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
