"""The rooms of docs/architecture.md: each imports only from rooms below it, and no module is a corridor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.md"
pytestmark = pytest.mark.skipif(not PICTURE.exists(), reason="not a source checkout")
FOLDERS = ("harness", "methods", "eval")
MOST_LINES = 400
MODULE = re.compile(r"ditbench\.[a-z_.]+")
PLUGINS = ("ditbench.methods", "ditbench.eval")  # folders that are listed by who looks for plugins, whatever is in them


def floors() -> list[tuple[str, ...]]:
    """The rooms as the picture has them, the lowest floor first; rooms of one line do not know each other."""
    (picture,) = re.findall(r"```rooms\n(.*?)```", PICTURE.read_text(), re.DOTALL)
    lines = [re.split(r"\s{3,}", line)[0] for line in picture.splitlines() if line.strip()]
    return [tuple(re.findall(r"[\w.]+(?=/|\.py)", line)) for line in reversed(lines)]


def rank() -> dict[str, int]:
    return {room: floor for floor, rooms in enumerate(floors()) for room in rooms}


def room_of(module: str) -> str:
    """ditbench.harness.quant.spec → quant, ditbench.eval.base → eval, anything else → nothing."""
    parts = module.split(".")
    if parts[0] != "ditbench" or len(parts) < 2 or parts[1] not in FOLDERS:
        return ""
    return (parts[2] if len(parts) > 2 else "") if parts[1] == "harness" else parts[1]


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield f"ditbench.{name.removesuffix('.__init__')}", path


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file names: imported, also inside functions and for type checkers only, or as text, for
    importlib. Whole rooms that are imported as one name could be climbed through by attributes: that is no way to import.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
            assert "ditbench.harness" not in named, f"{path}: name what is imported"
            yield from named
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: imports are written out from ditbench"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not {f"ditbench.{folder}" for folder in FOLDERS} & set(named), f"{path}: name what is imported"
            yield from named
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value.rstrip(".")] if MODULE.fullmatch(node.value) else []
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            assert not re.match(r"ditbench\.(harness|methods|eval)\b", whole), f"{path}: {whole} is not imported"


@pytest.mark.parametrize(
    "line",
    [
        "import ditbench.harness as h",
        "from ditbench import harness",
        "import ditbench.harness.common.errors\nditbench.harness.report.html",
    ],
)
def test_rooms_cannot_be_climbed_through_by_attributes(line, tmp_path):
    (tmp_path / "module.py").write_text(line)
    with pytest.raises(AssertionError, match=r"module\.py"):
        list(imports(tmp_path / "module.py"))


@pytest.mark.parametrize(
    "line",
    [
        "import ditbench.harness.report.html",
        "from ditbench.harness import report",
        "from ditbench.harness.report import *",
        "def f():\n    import ditbench.harness.report",
        "importlib.import_module('ditbench.harness.report.html')",
        "__import__('ditbench.harness.report')",
    ],
)
def test_an_import_is_seen_in_whatever_form(line, tmp_path):
    (tmp_path / "module.py").write_text(line)
    assert "report" in {room_of(name) for name in imports(tmp_path / "module.py")}


def test_the_packages_above_the_rooms_import_nothing_and_no_folder_is_imported_from_the_top():
    for name, path in modules():
        named = list(imports(path))
        assert not {each.partition(".")[0] for each in named} & set(FOLDERS), path
        assert room_of(name) or not [each for each in named if room_of(each)], f"{path} belongs to no room"


def test_every_room_stands_in_the_picture():
    rooms = {room_of(name) for name, path in modules()} - {""}
    assert rooms == set(rank())


def test_no_room_imports_from_one_above_or_beside_it():
    ranks, wrong = rank(), []
    for name, path in modules():
        for imported in imports(path):
            if imported in PLUGINS and "registry" in name:
                continue
            ours, theirs = room_of(name), room_of(imported)
            if ours and theirs and ours != theirs and ranks[theirs] >= ranks[ours]:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_inside_a_room():
    known = {name for name, _ in modules()}
    reads: dict[str, set[str]] = {}
    for name, path in modules():
        named = set(imports(path)) | {each.rpartition(".")[0] for each in imports(path)}
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        reads[name] = (named & known) - {name, package}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(reads[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in reads:
        visit(name, ())


def test_no_module_is_longer_than_one_can_take_in():
    places = [path for folder in (*FOLDERS, "tests", "bench", "src") for path in (ROOT / folder).rglob("*.py")]
    assert not [f"{path}: {count}" for path in places if (count := len(path.read_text().splitlines())) > MOST_LINES]
