"""What a method is made of: one file of ours, the whole package of somebody else's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from ditbench.harness.common.code_identity import files_sha256, source_files
from ditbench.harness.common.files import file_sha256
from ditbench.methods import rtn


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """importable({"place/of.py": source}, "module") → the module; forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(files: dict[str, str], name: str):
        for place, source in files.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def names(files: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files]


def test_a_method_of_ours_is_its_own_file_and_has_that_files_hash():
    assert source_files(rtn) == [Path(rtn.__file__)]
    assert files_sha256(source_files(rtn)) == file_sha256(Path(rtn.__file__))


def test_a_plugin_of_one_file_is_that_file(importable, tmp_path):
    assert names(source_files(importable({"lone_plugin.py": ""}, "lone_plugin")), tmp_path) == ["lone_plugin.py"]


PLACES = (
    "pack_plugin/__init__.py",
    "pack_plugin/common/helper.py",
    "pack_plugin/common/__init__.py",
    "pack_plugin/sub/m.py",
)


def test_a_plugin_in_a_package_is_all_of_the_package_and_an_edited_helper_is_seen(importable, tmp_path):
    found = source_files(importable(dict.fromkeys((*PLACES, "pack_plugin/sub/__init__.py"), ""), "pack_plugin.sub.m"))
    assert set(names(found, tmp_path)) == {*PLACES, "pack_plugin/sub/__init__.py"}
    before = files_sha256(found)
    (tmp_path / "pack_plugin/common/helper.py").write_text("SCALE = 2")
    assert files_sha256(found) != before


def test_a_package_that_is_the_method_is_all_of_itself(importable, tmp_path):
    module = importable({"whole_plugin/__init__.py": "", "whole_plugin/helper.py": ""}, "whole_plugin")
    assert len(source_files(module)) == 2


def test_neighbours_in_a_namespace_do_not_count(importable, tmp_path):
    places = {"shared_space/mine/__init__.py": "", "shared_space/mine/m.py": "", "shared_space/other/m.py": ""}
    found = source_files(importable(places, "shared_space.mine.m"))
    assert names(found, tmp_path) == ["shared_space/mine/__init__.py", "shared_space/mine/m.py"]
    (alone,) = source_files(importable({"shared_space/alone.py": ""}, "shared_space.alone"))
    assert alone.name == "alone.py"


def test_files_that_change_places_are_told_apart(tmp_path):
    for name, text in (("a.py", "1"), ("b.py", "2")):
        (tmp_path / name).write_text(text)
    before = files_sha256([tmp_path / "a.py", tmp_path / "b.py"])
    (tmp_path / "a.py").write_text("2"), (tmp_path / "b.py").write_text("1")
    assert files_sha256([tmp_path / "a.py", tmp_path / "b.py"]) != before
