"""Hydra: what is registered with it, and overrides checked before a sweep starts."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import OverrideParseException

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.paths import CONF, options
from ditbench.harness.fitting import registry
from ditbench.harness.quant.spec import MIXED, all_labels, parse_label


def register() -> None:
    """Every method's defaults and every format of bits= as configuration nodes."""
    store = ConfigStore.instance()
    for name in registry.known_methods():
        store.store(group="method", name=f"{name}_defaults", node=registry.defaults(name))
        if not (CONF / "method" / f"{name}.yaml").exists():  # a plugin's method needs no file here
            store.store(group="method", name=name, node=registry.defaults(name))
    for label in all_labels():
        node: dict[str, Any] = {"defaults": ["default", "_self_"], "label": label, **parse_label(label).sides()}
        store.store(group="bits", name=label, node=node)


def groups() -> dict[str, list[str]]:
    """{configuration group: its options}."""
    found = {folder.name: [path.stem for path in options(folder.name)] for folder in CONF.iterdir() if folder.is_dir()}
    found["method"] = sorted(registry.known_methods())
    found["bits"] = [*all_labels(), MIXED]
    return found


def check_overrides(overrides: list[str]) -> None:
    """Raise UserError for a choice that no group has, before any run of a sweep has started.

    Hydra composes the jobs of a sweep one after the other; without this a typo in the last method would be found when
    all others have run.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise not_an_override(error) from error
    known = groups()
    for override in parsed:
        if override.is_delete():
            raise UserError(f"{override.input_line}: nothing can be left out; give it another value instead")
        if override.key_or_group not in known:
            continue
        if override.value() is None:
            raise unknown_name(override.key_or_group, "null", known[override.key_or_group])
        for choice in _choices(override):
            if override.key_or_group == "bits" and choice != MIXED:
                parse_label(choice)
            if choice not in known[override.key_or_group]:
                raise unknown_name(override.key_or_group, choice, known[override.key_or_group])


def not_an_override(error: OverrideParseException) -> UserError:
    return UserError(f"{error.override!r} is not an override; write name=value, such as bits=w4a8")


def _choices(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(item) for item in value.list]
    return [str(value)] if isinstance(value, (str, int)) else []
