"""Every format against the libraries that ship it, bit for bit, on tensors that ask for trouble (`bench/format_oracles.py`).

What differs is a documented quirk of theirs (docs/backends.md): blocks so small that the power of two would be 2⁻¹²⁷, and a floor
under scales.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("not a source checkout", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import format_oracles  # noqa: E402

ORACLES = format_oracles.here()
SUBNORMALS = "float32 subnormals"
DIFFER = {"MXFP": {SUBNORMALS}, "INT4": {"tiny", SUBNORMALS}}  # by the first letters of the format


def test_the_libraries_are_there_or_their_table_is():
    """The rows of libraries that are not installed were written where they were."""
    if not ORACLES:
        pytest.skip("neither torchao nor comfy-kitchen is installed: pip install 'ditbench[oracles]'")
    with format_oracles.OUT.open() as file:
        said = {(row["format"], row["rule"], row["oracle"].split()[0]) for row in csv.DictReader(file)}
    assert {(each.format, each.spec.scale_rule or "–", each.library) for each in ORACLES} <= said


@pytest.mark.parametrize("tensor", format_oracles.tensors())
def test_every_code_and_scale_is_theirs(tensor):
    if not ORACLES:
        pytest.skip("neither torchao nor comfy-kitchen is installed: pip install 'ditbench[oracles]'")
    x = format_oracles.tensors()[tensor]
    for oracle in ORACLES:
        _, codes, _, scales = format_oracles.compare(oracle, x)
        odd = any(tensor in names for start, names in DIFFER.items() if oracle.format.startswith(start))
        assert odd or (codes, scales) == (0, 0), (
            f"{oracle.format} {oracle.spec.rule} {oracle.name}: {codes}, {scales} differ"
        )
