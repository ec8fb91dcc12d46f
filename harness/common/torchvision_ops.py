"""Let `import torchvision` succeed beside a CPU-only torch.

A plain torchvision wheel is built against CUDA torch; beside a CPU build its C++ ops do not load, and the
first `register_fake("torchvision::nms")` raises `operator torchvision::nms does not exist`, which takes
diffusers, transformers, torch-fidelity and clean-fid down with it. Declaring the two schemas is enough:
nothing in this project calls them. Where the C++ ops do load, this module changes nothing.
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # a Library's registrations live as long as the object


def _cpp_ops_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # no torchvision at all: nothing to mend
    from pathlib import Path

    folder = Path(next(iter(spec.submodule_search_locations)))
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


def ensure_torchvision_imports() -> None:
    """Declare torchvision's missing operator schemas; idempotent."""
    if _libraries or _cpp_ops_load():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _libraries.append(library)
