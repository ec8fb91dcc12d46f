"""What backends that call another library have in common; not a backend itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def library_lacks(name: str, package: str, entry: Callable[[], Any]) -> str | None:
    """Why the backend's library cannot be had. entry: imports what the backend calls. No `MachineLacks`: these backends are never
    chosen by themselves, and whoever did not ask for the library misses nothing.
    """
    if find_spec(package.replace("-", "_")) is None:
        return f"{name} needs {package}, which is not installed: pip install {package}"
    try:
        entry()
    except ImportError as error:
        return f"{name} needs a newer {package} ({error}): pip install -U {package}"
    return None
