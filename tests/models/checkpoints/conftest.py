"""Small pipelines as diffusers saves them, and nothing that reaches a network."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_cases import WEIGHTS
from safetensors.torch import load_file, save_file
from small_pipelines import SMALL

LIBRARIES = ("diffusers", "transformers", "peft")


@pytest.fixture(autouse=True)
def tried(monkeypatch) -> list[str]:
    """Addresses that somebody tried to reach."""
    found: list[str] = []

    def refuse(*arguments: object, **more: object) -> None:
        found.append(str(arguments))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return found


@pytest.fixture
def printed() -> Iterator[list[str]]:
    """What the libraries' own handlers would print."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: found.append(entry.getMessage())  # type: ignore[method-assign]
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    yield found
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small pipelines as diffusers saves them. Not to be changed: copy them first."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("flux", "pixart", "ltx", "sd3", "wan"):
        torch.manual_seed(0)
        pipe = SMALL[name]()
        pipe.save_pretrained(root / name)
        pipe.save_pretrained(root / f"{name}-fp16", variant="fp16")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def own_flux(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["flux"], tmp_path / "flux"))


@pytest.fixture(scope="module")
def another(folders, tmp_path_factory) -> Path:
    """A transformer's folder: flux with other weights."""
    folder = Path(shutil.copytree(folders["flux"] / "transformer", tmp_path_factory.mktemp("another") / "transformer"))
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
