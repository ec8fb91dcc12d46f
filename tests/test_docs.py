"""The tables in docs/ are those of the recorded results, and every method has its section."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ditbench.harness.fitting import registry

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("harness", "methods", "eval")
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source checkout")


def test_the_numbers_of_the_docs_are_what_was_recorded():
    done = subprocess.run([sys.executable, "bench/docs_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_section():
    page = (ROOT / "docs" / "methods.md").read_text()
    headings = {name.strip() for line in page.splitlines() if line.startswith("## ") for name in line[3:].split(",")}
    assert set(registry.known_methods()) <= headings


def test_every_module_and_file_that_is_named_exists():
    """In pages and docstrings: `harness.quant.spec`, `ditbench.eval.base.metric`, harness/quant/spec.py. The changelog names
    what there was.
    """
    missing = []
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]:
        text = page.read_text()
        for name in re.findall(r"(?:`|ditbench\.)((?:harness|methods|eval)(?:\.\w+)+)", text):
            if not named(name.split(".")):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
        for path in re.findall(
            r"(?<![\w/])(?:harness|methods|eval|conf|docs|tests|bench)/[\w./-]+\.(?:py|yaml|md|sh|cpp)\b", text
        ):
            if not (ROOT / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {path}")
    assert not missing, "\n".join(missing)


def test_every_extra_that_is_named_can_be_installed():
    """In pages and messages: pip install 'ditbench[ray]'."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
    named = {(page.name, extra) for page in pages for extra in re.findall(r"ditbench\[(\w+)\]", page.read_text())}
    assert len(named) > 10 and not [each for each in named if each[1] not in extras]


def test_every_link_leads_to_a_page_and_a_heading_of_it():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    lost = []
    for page, link in links:
        place, _, heading = link.partition("#")
        there = (page.parent / place).resolve() if place else page
        if "://" not in link and (not there.exists() or heading and heading not in anchors(there)):
            lost.append(f"{page.name}: {link}")
    assert len(links) > 100 and not lost, "\n".join(lost)


@pytest.mark.parametrize("page", ["add-a-method.md", "add-a-metric.md", "add-a-model.md"])
def test_what_a_plugin_may_import_can_be_imported(page):
    rows = re.findall(r"^\| (`(?:harness|eval)\.[^|]+) \| ([^|]+) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert len(rows) >= 7
    for modules, names in rows:
        found = [importlib.import_module(f"ditbench.{module}") for module in re.findall(r"`([\w.]+)`", modules)]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(module, name) for module in found), f"{modules} has no {name}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    }


def named(parts: list[str]) -> bool:
    """Whether it is a package or a module, or what a module defines."""
    place = ROOT.joinpath(*parts)
    if place.is_dir() or place.with_suffix(".py").is_file():
        return True
    module = ROOT.joinpath(*parts[:-1])
    file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
    defined = rf"^(?:(?:async )?def |class )?{parts[-1]}\b|^from \S+ import .*\b{parts[-1]}\b"
    return file.is_file() and re.search(defined, file.read_text(), re.MULTILINE) is not None
