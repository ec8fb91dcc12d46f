"""Finding methods and checking their shape.

A method is a module with: a docstring whose first line names it and its paper; `Params`, a frozen dataclass;
`fit(target, calibration, bits, params) -> {str: Tensor}`; `apply(target, state, bits, params) -> ModelRecipe`.
Optional: `FORMS`, {name: Form}: other sets of parameters that it comes in, "published" above all (`harness.fitting.forms`);
`check_bits(bits)` raises UserError for formats it does not define;
`select_calibration(calibration, params, seed) -> Calibration` chooses what it is calibrated on (PTQ4DM, Q-Diffusion);
`correct_step(state, params, step, noise) -> noise` corrects the sampler's guided noise estimate, and
`correct_variance(state, params, step, variance, weight) -> variance` what an ancestral sampler adds (PTQD).

One row is no method: `EXTERNAL`, what somebody else quantized. Its module has `Params` and `load`; stages/external.py calls it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, fields
from functools import cache, partial
from types import ModuleType
from typing import Any

from torch import Tensor

from ditbench.harness.common.code_identity import files_sha256, source_files
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.plugins import Broken, load_plugins
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.fitting.forms import DEFAULT, Form
from ditbench.harness.models.base import Correction
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import FORMATS, Bits, bits_of
from ditbench.harness.quant.target import Target

ENTRY_POINTS = "ditbench.methods"
FLOAT = "fp"  # the 16-bit reference: it ignores bits
EXTERNAL = "external"  # what somebody else quantized: its bits are read from its tensors


_broken = Broken()


@cache
def known_methods() -> dict[str, ModuleType]:
    """{name: module}, from methods/ and from installed packages. A plugin that is broken, or that has the name of another
    method, is said once and left out.
    """
    package = importlib.import_module("ditbench.methods")  # plugins: this room knows none of them

    found: dict[str, ModuleType] = {}

    def take(name: str, module: ModuleType) -> None:
        if name in found:
            raise UserError(f"there is another method {name!r} ({found[name].__file__}); rename it")
        _check_shape(module)
        found[name] = module

    for module in pkgutil.iter_modules(package.__path__):
        if module.name == EXTERNAL:
            continue
        take(module.name, importlib.import_module(f"ditbench.methods.{module.name}"))
    _broken.clear()
    load_plugins(ENTRY_POINTS, "method", take, _broken)
    return dict(sorted(found.items()))


def correction(name: str, state: dict[str, Tensor], params: Any) -> Correction | None:
    """What the method changes in the sampler's step; None for most."""
    step, variance = (getattr(method(name), hook, None) for hook in ("correct_step", "correct_variance"))
    if step is None and variance is None:
        return None
    return Correction(
        noise=None if step is None else partial(step, state, params),
        variance=None if variance is None else partial(variance, state, params),
    )


def choices() -> list[str]:
    """All that `method=` may be: the methods, and what somebody else quantized."""
    return sorted([*known_methods(), EXTERNAL])


def method(name: str) -> ModuleType:
    """The module of one of `choices`."""
    if name == EXTERNAL:
        return importlib.import_module(f"ditbench.methods.{EXTERNAL}")
    known = known_methods()
    if name not in known:
        raise no_method(name)
    return known[name]


def no_method(name: str) -> UserError:
    """Why there is no such method: its plugin is broken, or the name is misspelt."""
    return _broken.error(name, unknown_name("method", name, known_methods()))


def defaults(name: str) -> dict[str, Any]:
    """The method's configuration node where nothing is said: its name, its form and the defaults of its Params."""
    return {"name": name, "form": DEFAULT, **asdict(method(name).Params())}


def forms_of(name: str) -> dict[str, Form]:
    """{name: Form} that the method comes in, the default one first."""
    return {DEFAULT: Form(), **getattr(method(name), "FORMS", {})}


def form_value(name: str, form: str, setting: str, otherwise: Any) -> Any:
    """What the form says of a setting, such as method.iterations or bits.weight.symmetric; an unknown form says nothing."""
    chosen = forms_of(name).get(form, Form())
    section, _, parameter = setting.partition(".")
    return chosen.params.get(parameter, otherwise) if section == "method" else chosen.settings.get(setting, otherwise)


def params_of(config: dict[str, Any]) -> Any:
    """The frozen Params of a method's configuration node.

    Raises:
        UserError: an unknown form or field, a value of another type than the field's, or one that Params refuses.
    """
    values = dict(config)
    name = values.pop("name")
    form = values.pop("form", DEFAULT)  # records from before there were forms have none
    if not isinstance(form, str) or form not in forms_of(name):
        raise unknown_name(f"form of method {name}", str(form), forms_of(name))
    params_class = method(name).Params
    unknown = set(values) - {field.name for field in fields(params_class)}
    if unknown:
        raise unknown_name(f"parameter of method {name}", sorted(unknown)[0], [f.name for f in fields(params_class)])
    check_types(params_class, values, f"method {name}: method")
    try:
        return params_class(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_bits(name: str, bits: Bits) -> None:
    check = getattr(method(name), "check_bits", None)
    if check is not None:
        check(bits)


def formats_of(name: str) -> list[str]:
    """Of FORMATS, those that the method defines."""
    defined = []
    for label in FORMATS:
        try:
            check_bits(name, bits_of(label))
            defined.append(label)
        except UserError:
            continue
    return defined


def check_state(name: str, state: Any) -> None:
    """Raise UserError unless it is what `fit` returns: tensors by name."""
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise UserError(f"method {name}: fit returned a {kind}, expected tensors by name ({{}} if it learns nothing)")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"method {name}: state[{key!r}] of fit is a {type(value).__name__}, expected a tensor")


def check_recipe(name: str, recipe: Any, target: Target) -> None:
    """Raise UserError unless it is what `apply` returns: a recipe of layers that the model has."""
    if not isinstance(recipe, ModelRecipe):
        raise UserError(f"method {name}: apply returned a {type(recipe).__name__}, expected a ModelRecipe")
    known = dict(target.transformer.named_modules())
    for layer in recipe.layers:
        if layer not in known:
            raise unknown_name(f"layer (recipe of method {name})", layer, target.layers)


def source_sha256(name: str) -> str:
    """Hash of the method's sources: editing a method, or a helper in a plugin's package, makes new runs of it."""
    return files_sha256(source_files(method(name)))


def summary(name: str) -> str:
    return (method(name).__doc__ or "").strip().split("\n")[0]


def _check_shape(module: ModuleType) -> None:
    for part in ("Params", "fit", "apply"):
        if not hasattr(module, part):
            raise UserError(f"it has no {part}; see docs/add-a-method.md")
    dataclass_params = getattr(module.Params, "__dataclass_params__", None)
    if dataclass_params is None or not dataclass_params.frozen:
        raise UserError("Params must be a frozen dataclass")
    taken = {"name", "form"} & {field.name for field in fields(module.Params)}
    if taken:
        raise UserError(f"Params has a field {taken.pop()!r}, which is the configuration's own; call it something else")
    for name, form in getattr(module, "FORMS", {}).items():
        try:
            module.Params(**form.params)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"FORMS[{name!r}] is no Form of its Params ({error})") from error
    try:
        module.Params()
    except (TypeError, ValueError) as error:
        raise UserError(f"Params() must be what its defaults make ({error})") from error
