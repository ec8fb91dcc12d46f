"""Hydra: what is registered with it, and overrides checked before a sweep starts."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditbench.harness.common.errors import UserError, reason, unknown_name
from ditbench.harness.common.paths import CONF, checked, options, own_configurations
from ditbench.harness.common.timer import say
from ditbench.harness.fitting import registry
from ditbench.harness.quant.spec import MIXED, all_labels, parse_label

SEARCH_PATH = "hydra.searchpath"
FILE = "file://"


def find_plugins() -> None:
    """Have Hydra import every package of `hydra_plugins` on the path now, the working directory's under `python -m`.

    Raises:
        UserError: one of them breaks. Those that only lack a package are left out, and named in a line.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            Plugins.instance()
        except (Exception, SystemExit) as error:
            file = _inside_plugins(error)
            raise UserError(
                f"{file or 'a package of hydra_plugins'}: Hydra imports what is called hydra_plugins, and this breaks "
                f"({reason(error)}); mend or rename it"
            ) from error
    for each in told:
        say(f"Hydra: {' '.join(str(each.message).split())}")


def _inside_plugins(error: BaseException) -> str | None:
    """The innermost file of hydra_plugins that an error came from."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    files += [error.filename] if isinstance(error, SyntaxError) and error.filename else []
    return next((file for file in reversed(files) if "hydra_plugins" in Path(file).parts), None)


def register() -> None:
    """Every method's defaults and every format of bits= as configuration nodes, once Hydra's plugins are found."""
    find_plugins()
    store = ConfigStore.instance()
    for name in registry.known_methods():
        store.store(group="method", name=f"{name}_defaults", node=registry.defaults(name))
        if not (CONF / "method" / f"{name}.yaml").exists():  # a plugin's method needs no file here
            store.store(group="method", name=name, node=registry.defaults(name))
    for label in all_labels():
        node: dict[str, Any] = {"defaults": ["default", "_self_"], "label": label, **parse_label(label).sides()}
        store.store(group="bits", name=label, node=node)


def groups(beside: Iterable[Path] = ()) -> dict[str, list[str]]:
    """{configuration group: its options}. beside: folders of configurations that Hydra was told of."""
    names = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    found = {name: [path.stem for path in options(name, beside)] for name in names}
    found["method"] = sorted(registry.known_methods())
    found["bits"] = [*all_labels(), MIXED]
    return found


def search_path() -> list[str]:
    """The override that has Hydra look into a user's folders of configurations, too."""
    escaped = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in own_configurations()]
    listed = ",".join(f"'{FILE}{folder}'" for folder in escaped)
    return [f"{SEARCH_PATH}=[{listed}]"] if escaped else []


def check_overrides(overrides: list[str]) -> None:
    """Raise UserError for a choice that no group has, before any run of a sweep has started.

    Hydra composes the jobs of a sweep one after the other; without this a typo in the last method would be found when
    all others have run.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise not_an_override(error) from error
    searched = [str(item) for o in parsed if o.key_or_group == SEARCH_PATH for item in o.value() or ()]
    if searched and own_configurations():
        raise UserError(f"{SEARCH_PATH} and --config-dir: give one of them; --config-dir may be given several times")
    known = groups(checked(each.removeprefix(FILE), SEARCH_PATH) for each in searched if each.startswith(FILE))
    if not all(each.startswith(FILE) for each in searched):
        return  # Hydra alone knows what a package holds
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
            if override.key_or_group == "method" and choice not in known["method"]:
                raise registry.no_method(choice)
            if choice not in known[override.key_or_group]:
                raise unknown_name(override.key_or_group, choice, known[override.key_or_group])


def not_an_override(error: OverrideParseException) -> UserError:
    return UserError(f"{error.override!r} is not an override; write name=value, such as bits=w4a8")


def _choices(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(item) for item in value.list]
    return [str(value)] if isinstance(value, (str, int)) else []


def composed(jobs: Iterable[Iterable[str]]) -> list[dict[str, Any]]:
    """The resolved configuration that each job's overrides make; nothing is run.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"), hydra_errors_explained():
        made = []
        for overrides in map(list, jobs):
            check_overrides(overrides)
            config = hydra.compose("config", [*overrides, *search_path()])
            made.append(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        return made  # type: ignore[return-value]


@contextmanager
def hydra_errors_explained() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error) from error


def _explained(error: Exception) -> UserError:
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
        if node is not None and key is not None and "not in struct" in str(cause):
            section = getattr(cause, "full_key", key).rpartition(".")[0]
            return unknown_name(f"setting of {section}" if section else "setting", str(key), map(str, node))
        if isinstance(cause, OverrideParseException):
            return not_an_override(cause)
        if str(cause).startswith("Ambiguous value for argument"):
            return UserError(f"{str(cause).splitlines()[0]}: add -m to sweep over it, or write name=[a,b] for a list")
    return UserError(str(chain[-1]).strip().split("\n")[0] or str(error).split("\n")[0])
