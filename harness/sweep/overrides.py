"""What a user writes behind `ditbench run`, looked at before anything is composed: overrides, in Hydra's grammar, and its flags.

Hydra composes the jobs of a sweep one after the other; without this a typo in the last method would be found when all others
have run.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException, OverrideParseException

from ditbench.harness.common.errors import UserError, shortened, unknown_name
from ditbench.harness.fitting import registry
from ditbench.harness.quant.spec import MIXED, parse_label
from ditbench.harness.stages.values import SETTINGS

FREE = (
    "model",
    "method",
    "bits",
    "launcher",
)  # sections that their dataclasses check: not all that these have is in every file
HYDRA = "hydra"
SWEEPER, BASIC, OPTUNA = "hydra/sweeper", "basic", "optuna"


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Raises UserError for what is no override."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise not_an_override(error) from error
    except RecursionError as error:
        raise UserError("an override has brackets nested without end") from error


def check_overrides(overrides: Iterable[Override], known: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError for a choice that no group has. known: {configuration group: its options}."""
    overrides = list(overrides)
    sweepers = [str(each.value()) for each in overrides if each.key_or_group == SWEEPER]
    if OPTUNA in sweepers and not optuna_is_here():
        raise UserError(f"{SWEEPER}={OPTUNA}: hydra-optuna-sweeper is not installed; pip install 'ditbench[optuna]'")
    for override in overrides:
        _check(override, known, intervals=bool({*sweepers} - {BASIC}))


def optuna_is_here() -> bool:
    try:
        return find_spec("hydra_plugins.hydra_optuna_sweeper") is not None and find_spec("optuna") is not None
    except ModuleNotFoundError:  # no plugin of Hydra's at all
        return False


def check_flags(arguments: Sequence[str]) -> None:
    """Raise UserError for a flag that neither we nor Hydra have, or one whose value is missing or another than can be."""
    parser = get_args_parser()
    flags = sorted(name for name in parser._option_string_actions if name.startswith("--"))

    def refuse(message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ").split()[0]
        close = difflib.get_close_matches(wrong, [*flags, "--force", "--strict", "--debug", "--plan"], n=1)
        guess = f"; did you mean {close[0]}?" if close and close[0] not in message else ""
        raise UserError(f"run: {message}{guess} (ditbench run --help)")

    parser.error = refuse  # type: ignore[method-assign]
    chosen = parser.parse_args(list(arguments))
    if chosen.resolve and not chosen.cfg:
        raise UserError("run: --resolve goes with --cfg job")


def not_an_override(error: OverrideParseException) -> UserError:
    """What it should look like; if its value has a character of Hydra's grammar, how it is written in quotes."""
    text = str(error.override)
    return UserError(f"{shortened(text)!r} is not an override; write name=value, such as bits=w4a8{in_quotes(text)}")


def in_quotes(text: str) -> str:
    """ "; in quotes: …" as a shell takes it, if that makes the text an override whose value is what stands behind its =."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value or value[0] in "'\"":
        return ""
    quoted = "{}='{}'".format(name, value.replace("\\'", "\\\\'").replace("'", "\\'"))
    try:
        read = OverridesParser.create().parse_override(quoted).value()
    except (HydraException, RecursionError):
        return ""
    if not isinstance(read, (str, QuotedString)) or getattr(read, "text", read) != value:
        return ""
    return f"; if the value is all of {shortened(value, 100)}, in quotes: {shortened(for_a_shell(quoted))}"


def for_a_shell(text: str) -> str:
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def unknown_setting(
    name: str, beside: Iterable[str], section: str, everywhere: Iterable[str], chosen: str | None = None
) -> UserError:
    """no setting 'n'; did you mean protocol.n or calibration.n?

    section: where it was looked for, "" at the top; beside: what is there. everywhere: the names, with dots, of all settings there are.
    chosen: "method=rtn", the choice that has no such setting, where another might have it.
    """
    beside, everywhere = sorted(beside), list(everywhere)
    said = f"no {f'setting of {section}' if section else 'setting'} {name!r}"
    in_section = [f"{section}.{each}" if section else each for each in beside]
    last = {each: each.rpartition(".")[2] for each in everywhere}
    here = dict(zip(in_section, beside, strict=True))
    meant = _close(name, here, 0.85) or [each for each in everywhere if last[each] == name]
    meant = meant or _close(name, here, 0.75) or _close(name, last, 0.7) or _close(name, here, 0.5)
    guess = f"did you mean {' or '.join(meant)}? " if meant else ""
    whose = f"{chosen} has" if chosen else "known:"
    if meant and meant[0] not in in_section:
        return UserError(f"{said}{f' ({chosen})' if chosen else ''}; {guess.strip()}")
    return UserError(f"{said}; {guess}{whose} {', '.join(beside)}")


def _close(name: str, names: Mapping[str, str], least: float) -> list[str]:
    """Of {setting: its last part} those whose last part is spelled much like the name."""
    found = difflib.get_close_matches(name, set(names.values()), n=1, cutoff=least)
    return [each for each, last in names.items() if found and last == found[0]]


def _check(override: Override, known: Mapping[str, Iterable[str]], intervals: bool) -> None:
    key, text = override.key_or_group, str(override.input_line)
    if override.is_delete():
        raise UserError(f"{text}: nothing can be left out; give it another value instead")
    if not key:
        raise UserError(f"{text!r} is not an override; write name=value, such as bits=w4a8")
    if key == HYDRA:
        raise UserError(
            f"{text}: hydra is a section of Hydra's own; name one of its settings, such as hydra.verbose=true"
        )
    _check_sweep(override, known.get(key), intervals)
    if key not in known:
        added = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        if added and key not in SETTINGS and key.split(".")[0].split("/")[0] not in (*FREE, HYDRA):
            section, _, name = key.rpartition(".")
            beside = [each.rpartition(".")[2] for each in SETTINGS if each.rpartition(".")[0] == section]
            raise unknown_setting(name, beside or SETTINGS, section, SETTINGS)
        return
    value = override.value()
    if isinstance(value, list):
        raise UserError(f"{text}: {key} takes one name; with -m several, {key}=a,b, make a sweep")
    for choice in _choices(override):
        if key == "bits" and choice != MIXED:
            parse_label(choice)
        if key == "method" and choice not in known[key]:
            raise registry.no_method(choice)
        if choice not in known[key]:
            raise unknown_name(key, choice, known[key])


def _choices(override: Override) -> list[str]:
    value = override.value()
    if value is None:
        return ["null"]
    if isinstance(value, ChoiceSweep):
        return [str(item) for item in value.list]
    return [str(value)] if isinstance(value, (str, int)) else []


def _check_sweep(override: Override, options: Iterable[str] | None, intervals: bool) -> None:
    value, text = override.value(), str(override.input_line)
    if isinstance(value, IntervalSweep) and not intervals:
        raise UserError(f"{text}: an interval has no first value; name some, such as {override.key_or_group}=1,2")
    if isinstance(value, RangeSweep) and next(iter(value.range()), None) is None:
        raise UserError(f"{text}: this range is empty; write it as range(start,stop,step)")
    if isinstance(value, Glob):
        if options is None:
            raise UserError(f"{text}: glob() chooses among names, and {override.key_or_group} has none")
        if not value.filter(sorted(options)):
            raise unknown_name(override.key_or_group, ",".join(value.include), options)
