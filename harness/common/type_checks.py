"""Values from yaml or the command line against the annotations of the dataclass that they are for.

Hydra reads `off`, `yes` and `abc` as text. Text is true, so an unchecked `method.scale=off` would switch on what it is
meant to switch off, and no number would say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ditbench.harness.common.errors import UserError, unknown_name

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def check_types(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a value that the field of its name in the dataclass `kind` cannot hold, or that is for no field.

    A whole number will do for a float, a list for a tuple. Annotations of other classes are not checked.
    """
    expected = get_type_hints(kind)
    for name, value in values.items():
        if name not in expected:
            raise unknown_name(f"setting of {where}", str(name), expected)
        if not _fits(value, expected[name]):
            raise UserError(f"{where}.{name} must be {_words(expected[name])}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if (origin or hint) in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return False
        each = inner if origin is tuple and Ellipsis not in inner else inner[:1] * len(value)
        return not inner or (len(each) == len(value) and all(map(_fits, value, each)))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    plain = origin or hint
    return isinstance(value, plain) if plain in WORDS else True


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(each) for each in inner)
    if origin in (tuple, list) and inner:
        each = _words(inner[0]).removeprefix("a ")
        return f"a list of {each}s" if inner[0] in (int, float) else "a list"
    return WORDS.get(origin or hint, str(hint))
