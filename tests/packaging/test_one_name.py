"""One import package: nothing else becomes importable, and no module is loaded under two names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, checked

import ditbench

FOLDERS = ("harness", "methods", "eval")
in_a_checkout = pytest.mark.skipif(not (ROOT / "src" / "ditbench" / "harness").is_symlink(), reason="not a checkout")


def at_the_top(code: str, *path: str) -> subprocess.CompletedProcess[str]:
    """Python started at the top of the checkout, whose folders are then the first that an import finds."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@in_a_checkout
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_at_the_top_of_the_checkout_is_no_package_and_says_what_to_import(name):
    said = at_the_top(f"import {name}")
    assert said.returncode != 0
    assert said.stderr.splitlines()[-1].startswith(f"ImportError: import ditbench.{name} instead of {name}")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """{file: names of its module} of all that is loaded once everything was listed."""
    code = (
        "import collections, json, os, sys\n"
        "from ditbench.harness.cli import main\n"
        "assert all(main(['list', what]) == 0 for what in ('methods', 'metrics', 'backends'))\n"
        "found = collections.defaultdict(list)\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name != '__main__' and getattr(module, '__file__', None):\n"
        "        found[os.path.realpath(module.__file__)].append(name)\n"
        "print(json.dumps(found))"
    )
    said = at_the_top(code, str(Path(ditbench.__file__).parents[1]))
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@in_a_checkout
def test_no_module_is_loaded_under_two_names(loaded):
    ours = {file: names for file, names in loaded.items() if Path(file).is_relative_to(ROOT / "harness")}
    assert len(ours) > 20, "the harness of this checkout was not the one that ran"
    folders = [ROOT / folder for folder in (*FOLDERS, "src", "tests")]  # not a .venv, whose libraries have such twins
    here = {file: names for file, names in loaded.items() if any(map(Path(file).is_relative_to, folders))}
    assert {file: names for file, names in here.items() if len(names) > 1} == {}
    assert {name.partition(".")[0] for names in ours.values() for name in names} == {"ditbench"}
    assert not top_level(loaded) & set(FOLDERS)


@in_a_checkout
def test_what_there_is_can_be_listed_without_the_seconds_that_libraries_of_models_take(loaded):
    assert not top_level(loaded) & {"diffusers", "transformers", "torchvision", "hydra", "wandb"}
    assert "torch._dynamo" not in {name for names in loaded.values() for name in names}, "nor torch's compiler"


def top_level(loaded: dict[str, list[str]]) -> set[str]:
    return {name.partition(".")[0] for names in loaded.values() for name in names}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_from_the_sdist_holds_what_a_wheel_from_the_tree_holds(tree, wheel, tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    checked([*build, str(tree)])  # the sdist from the tree, the wheel from the sdist
    (sdist,), (from_sdist,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert names_in(from_sdist) == names_in(wheel)
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    weights = [name for name in inside if name.endswith("tiny-dit/transformer/diffusion_pytorch_model.safetensors")]
    assert weights == [
        "src/ditbench/harness/models/zoo/weights/tiny-dit/transformer/diffusion_pytorch_model.safetensors"
    ]
    assert sdist.stat().st_size < 40 * 2**20


def test_an_editable_install_makes_ditbench_importable_and_nothing_else(tree, tmp_path):
    """The wheel that `pip install -e` asks the build backend for: its one path holds one package."""
    hook = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    checked([sys.executable, "-c", hook], cwd=tree)
    (editable,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        (link,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        (folder,) = archive.read(link).decode().split()
    assert link.endswith(".pth") and Path(folder).is_relative_to(tree)
    assert {path.name for path in Path(folder).iterdir() if path.name != "__pycache__"} == {"ditbench"}
