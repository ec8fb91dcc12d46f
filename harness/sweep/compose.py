"""Hydra: what is registered with it, what it composes, and what it cannot compose in words of ours."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.paths import CONF, checked, configurations_outside, options
from ditbench.harness.common.watch import say
from ditbench.harness.fitting import registry
from ditbench.harness.quant.spec import MIXED, all_labels, parse_label
from ditbench.harness.sweep import overrides as checks

_registered: dict[tuple[str, str], dict[str, Any]] = {}

FORM = "form"  # of a resolver: ${form:SETTING,OTHERWISE} is what the form of the method at hand says of a setting
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
    """Every method's defaults and every format of bits= as configuration nodes, once Hydra's plugins are found; what is
    there already stays.
    """
    find_plugins()

    def store(group: str, name: str, node: dict[str, Any]) -> None:
        if _registered.get((group, name)) != node:
            ConfigStore.instance().store(group=group, name=name, node=node)
            _registered[group, name] = node

    # Hydra copies all that is stored at every composition, and copies what it loads once more: hundreds of nodes, half its time.
    ConfigStore.instance().__deepcopy__ = _itself  # type: ignore[attr-defined]
    for name in registry.choices():
        store("method", f"{name}_defaults", _node(name))
        if not (CONF / "method" / f"{name}.yaml").exists():  # a plugin's method needs no file here
            store("method", name, _node(name))
    for label in all_labels():
        node: dict[str, Any] = {"defaults": ["default", "_self_"], "label": label, **parse_label(label).sides()}
        store("bits", label, node)


def _itself(memo: dict[int, Any]) -> ConfigStore:
    return ConfigStore.instance()


def _node(name: str) -> dict[str, Any]:
    """The method's defaults; what one of its forms changes is left to the form, so that what is set by hand is stronger."""
    changed = {parameter for form in registry.forms_of(name).values() for parameter in form.params}
    return registry.defaults(name) | {parameter: f"${{{FORM}:method.{parameter},null}}" for parameter in changed}


def _of_the_form(setting: str, otherwise: Any, *, _root_: DictConfig) -> Any:
    """What the form of the configured method says of a setting; `otherwise` if it says nothing (of a parameter: its default)."""
    name, form = _root_.method.name, _root_.method.form
    section, _, parameter = setting.partition(".")
    if section == "method":
        otherwise = registry.defaults(name)[parameter]
    return registry.form_value(name, form, setting, otherwise)


# Here and not in a function: a launcher's own process imports this file, and no more.
OmegaConf.register_new_resolver(FORM, _of_the_form, replace=True)


def groups(beside: Iterable[Path] = ()) -> dict[str, list[str]]:
    """{configuration group: its options}. beside: folders of configurations that Hydra was told of."""
    names = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    found = {name: [path.stem for path in options(name, beside)] for name in names}
    found["method"] = registry.choices()
    found["bits"] = [*all_labels(), MIXED]
    return found


def default_choices() -> dict[str, str]:
    """{configuration group: what is chosen where nothing is said}, as `conf/config.yaml` has it."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = [each for each in listed if isinstance(each, dict)]
    return {group: name for each in chosen for group, name in each.items() if name and "override " not in group}


def search_path() -> list[str]:
    """The override that has Hydra look into the folders of a user's and of other packages' configurations, too."""
    escaped = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in configurations_outside()]
    listed = ",".join(f"'{FILE}{folder}'" for folder in escaped)
    return [f"{SEARCH_PATH}=[{listed}]"] if escaped else []


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for what is no override, and for a choice that no group has, before any run of a sweep has started."""
    parsed = checks.parsed(overrides)
    searched = [str(item) for o in parsed if o.key_or_group == SEARCH_PATH for item in o.value() or ()]
    if searched and search_path():
        raise UserError(
            f"{SEARCH_PATH}: --config-dir or a package names folders already; name this one by --config-dir, too"
        )
    of_files = [each.removeprefix(FILE) for each in searched if each.startswith(FILE)]
    known = groups(checked(each, SEARCH_PATH) for each in of_files)
    if len(of_files) == len(searched):  # else Hydra alone knows what a package holds
        checks.check_overrides(parsed, known)


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
            made.append(resolved(hydra.compose("config", [*overrides, *search_path()])))
        return made


@contextmanager
def hydra_errors_explained(job: Sequence[str] = ()) -> Iterator[None]:
    """job: the overrides of the one of a sweep that is composed."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error, job) from error


def unknown_key(error: BaseException) -> str | None:
    """The setting that a composition failed at, because no file has it; None: it failed otherwise."""
    cause = next((each for each in _causes(error) if _is_unknown(each)), None)
    return None if cause is None else str(getattr(cause, "full_key", None) or cause.key)  # type: ignore[attr-defined]


def resolved(config: DictConfig) -> dict[str, Any]:
    """Raises UserError: an interpolation leads nowhere, or something is missing."""
    with hydra_errors_explained():
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and what it was raised from, and so on."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _is_unknown(cause: BaseException) -> bool:
    node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
    return isinstance(node, DictConfig) and key is not None and "not in struct" in str(cause)


def _explained(error: Exception, job: Sequence[str]) -> UserError:
    chain = _causes(error)
    for cause in chain:
        if _is_unknown(cause):
            node, key = cause.parent_node, cause.key  # type: ignore[attr-defined]
            section = str(getattr(cause, "full_key", key)).rpartition(".")[0]
            chosen = _choice(section.partition(".")[0], node, job)
            return checks.unknown_setting(str(key), map(str, node), section, _settings_of(node), chosen)
        if isinstance(cause, OverrideParseException):
            return checks.not_an_override(cause)
        if str(cause).startswith("Ambiguous value for argument"):
            text = str(cause).split("'")[1]
            return UserError(
                f"{text!r} could be several values: add -m to sweep over them, or write name=[a,b] for a list"
                f"{checks.in_quotes(text)}"
            )
    said = str(chain[-1]).strip().split("\n")[0] or str(error).split("\n")[0]
    where = str(getattr(chain[-1], "full_key", None) or getattr(error, "full_key", None) or "")
    return UserError(f"{where}: {said}" if where and where not in said else said)


def _choice(section: str, node: DictConfig, job: Sequence[str]) -> str | None:
    """ "method=rtn": what the configuration that the node is part of has chosen for the section, where that is a job's own choice, or
    its method.
    """
    named = next((each for each in reversed(job) if each.startswith(f"{section}=")), None)
    if named is not None or section != "method":
        return named
    return f"method={OmegaConf.select(node._get_root(), 'method.name')}"


def _settings_of(node: DictConfig) -> list[str]:
    """Names, with dots, of all settings of the configuration that the node is part of: not Hydra's own, nor those that
    others are taken from.
    """

    def names(values: Any, name: str) -> Iterator[str]:
        if not isinstance(values, dict):
            yield name
            return
        for key, value in values.items():
            yield from names(value, f"{name}.{key}" if name else str(key))

    raw = OmegaConf.to_container(node._get_root(), resolve=False)
    return [name for name in names(raw, "") if not name.startswith(("hydra.", "model.usual."))]
