"""The tables in docs/ are those of the recorded results, and every method has its section."""

import subprocess
import sys
from pathlib import Path

import pytest

from ditbench.harness.fitting import registry

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source checkout")


def test_the_numbers_of_the_docs_are_what_was_recorded():
    done = subprocess.run([sys.executable, "bench/docs_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_section():
    page = (ROOT / "docs" / "methods.md").read_text()
    headings = {name.strip() for line in page.splitlines() if line.startswith("## ") for name in line[3:].split(",")}
    assert set(registry.known_methods()) <= headings
