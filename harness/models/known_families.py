"""Model families by name: the files of `families/`, and those of other packages, by their entry points in `ditbench.models`.

An entry point names a module like a file of `families/`; its name is the family's. The folder `conf` beside the module is a folder of
configurations (`common/paths.py`), so that a package brings its models' yaml files with it; a module that only does that has no FAMILY.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from ditbench.harness.common.code_identity import files_sha256, source_files
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.imports import importing
from ditbench.harness.common.paths import MODELS
from ditbench.harness.common.plugins import Broken, load_plugins
from ditbench.harness.models.base import Adapter

_broken = Broken()


def family(name: str) -> Adapter:
    """Raises UserError: no such family, or the package that has it is broken."""
    own = _own()
    if name in own:
        with importing():
            return _adapter(importlib.import_module(f"ditbench.harness.models.families.{name}"))
    others = of_others()
    if name not in others:
        raise _broken.error(name, unknown_name("model family", name, [*own, *others]))
    return _adapter(others[name])


def family_part(name: str) -> dict[str, str]:
    """What is part of a model's identity if its family is another package's: the hash of that package. Of ours, the code is known."""
    others = {} if name in _own() else of_others()
    return {"family": files_sha256(source_files(others[name]))} if name in others else {}


@cache
def of_others() -> dict[str, ModuleType]:
    """{name: module} of installed packages. One that is broken, or has the name of one of ours, is said once and left out."""
    found: dict[str, ModuleType] = {}

    def take(name: str, module: ModuleType) -> None:
        if name in _own():
            raise UserError(f"there is another model family {name!r}; rename it")
        if not isinstance(module, ModuleType):
            raise UserError(f"it names a {type(module).__name__} and not a module; leave out what follows the colon")
        if hasattr(_adapter(module), "sites"):
            found[name] = module

    _broken.clear()
    load_plugins(MODELS, "model family", take, _broken)
    return found


def _own() -> set[str]:
    import ditbench.harness.models.families as package

    return {module.name for module in pkgutil.iter_modules(package.__path__)}


def _adapter(module: ModuleType) -> Any:
    return getattr(module, "FAMILY", module)
