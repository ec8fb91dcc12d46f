"""What, besides the configuration, makes the numbers: our sources and the libraries that compute.

Each kind of artifact has its rooms here: an edit elsewhere makes none of it again.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from ditbench.harness.common.files import file_sha256
from ditbench.harness.common.paths import HARNESS

# Of common, what chooses where and how precisely is computed.
PRECISION = ("common/devices.py", "common/precision.py")
# What draws with a float or quantized transformer. `build` makes the float copy too, of the algebra's layers.
DRAWING = (*PRECISION, "samples", "quant", "backends", "build", "models")
RECORDING = (*DRAWING, "calibration")
STATISTICS = RECORDING
STATE = (*RECORDING, "fitting", "stages/states.py")  # and the method's own, see `registry.source_sha256`
SAMPLES = (*DRAWING, "generation")  # and the method's own, which may correct the sampler
VALUES = (*PRECISION, "samples", "eval")
LAYER_ERRORS = (*RECORDING, "measurement")

# The rooms whose code can change a number; the others choose, keep, show or tell.
COMPUTING = (*RECORDING, "fitting", "generation", "measurement", "stages", "eval", "run.py")
# Of these rooms, the files that only tell.
TELLERS = frozenset(["conformance.py", "export.py", "export_checks.py", "needs.py"])
TELLERS |= {"schedule.py", "step_finder.py"}
OURS = "ditbench"
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity", "clean-fid", "numpy", "scipy")
SCORING_PACKAGES = frozenset(["torchmetrics", "torch-fidelity", "clean-fid"])  # no other room than eval knows them


@cache
def code_identity(*rooms: str) -> dict[str, Any]:
    """{sources: one SHA-256, packages: {name: version}} of these rooms (or files of one), or of all that compute."""
    rooms = rooms or COMPUTING
    digest = hashlib.sha256()
    for path in sorted(path for room in rooms for path in _files(room) if path.name not in TELLERS):
        digest.update(path.relative_to(HARNESS.parent).as_posix().encode() + path.read_bytes())
    packages = [name for name in PACKAGES if "eval" in rooms or name not in SCORING_PACKAGES]
    return {"sources": digest.hexdigest(), "packages": {name: package_version(name) for name in packages}}


def source_files(module: ModuleType) -> list[Path]:
    """What a method or metric is made of: its own file if it is ours, all of its package if it is a plugin's."""
    file = Path(module.__file__ or "")
    name, *rest = module.__name__.split(".")
    while name != OURS and (rest or hasattr(module, "__path__")):
        package = sys.modules[name]
        if package.__file__ is not None:  # not a namespace that others share
            return sorted(path for folder in package.__path__ for path in Path(folder).rglob("*.py"))
        if not rest:
            break
        name = f"{name}.{rest.pop(0)}"
    return [file]


def files_sha256(files: Sequence[Path]) -> str:
    """Of one file its own SHA-256; of several over their places in what they have in common, too."""
    if len(files) == 1:
        return file_sha256(files[0])
    root = Path(os.path.commonpath(files))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _files(room: str) -> Iterator[Path]:
    place = HARNESS.parent / "eval" if room == "eval" else HARNESS / room
    if place.suffix:
        yield place
        return
    assert place.is_dir(), f"no room {room}"
    for kind in ("*.py", "*.cpp", "*.h"):
        yield from place.rglob(kind)
