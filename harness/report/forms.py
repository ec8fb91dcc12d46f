"""What need not stand in a run's name because the form of its method says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT, Form

FORM = ".method.form"
NAME = ".method.name"


def told_by_form(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Flat settings (".method.iterations") of runs of one method: where their forms differ, without what each run's form says.

    `svdquant form=published` is then told from `svdquant form=default` by that word, and by what was set by hand beside it.
    """
    forms = {run.get(FORM) for run in runs}
    name = runs[0].get(NAME)
    if len(forms) < 2 or name not in registry.known_methods():
        return [dict(run) for run in runs]
    known = registry.forms_of(name)
    defaults = asdict(registry.method(name).Params())
    changed = {setting for form in forms for setting in _says(known.get(str(form), Form()))}

    def is_said(setting: str, value: Any, run: Mapping[str, Any]) -> bool:
        if setting not in changed:
            return False
        own = _says(known.get(str(run.get(FORM) or DEFAULT), Form()))
        parameter = setting.removeprefix(".method.")
        if setting not in own and parameter == setting:
            return True  # of bits or calibration, which another form sets
        return _plain(value) == _plain(own.get(setting, defaults.get(parameter)))

    return [{key: value for key, value in run.items() if not is_said(key, value, run)} for run in runs]


def _says(form: Form) -> dict[str, Any]:
    return {f".method.{name}": value for name, value in form.params.items()} | {
        f".{name}": value for name, value in form.settings.items()
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
