"""Packages of extras are imported where they are used, and tell nobody."""

import subprocess
import sys

import pytest

from ditbench.harness.common import extras
from ditbench.harness.common.errors import UserError


def test_what_a_package_tells_its_makers_is_not_there_for_it(tmp_path, monkeypatch):
    (tmp_path / "talking_telemetry.py").write_text("raise AssertionError('it told')")
    (tmp_path / "talking.py").write_text(
        "try:\n    import talking_telemetry\n    told = True\nexcept ImportError:\n    told = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.TELLS, "talking", "talking_telemetry")
    for name in ("talking", "talking_telemetry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert extras.needed("talking", "talking", "a test").told is False


@pytest.mark.skipif(not extras.installed("openvino"), reason="the extra ditbench[openvino] is not installed")
def test_openvino_converts_without_telling_anybody():
    """In a fresh process: it takes its own stand-in."""
    script = (
        "from ditbench.harness.common.extras import needed; needed('openvino', 'openvino', 'x').convert_model; import sys; "
        "print(sys.modules['openvino.tools.ovc.telemetry_utils'].tm.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "openvino.tools.ovc.telemetry_stub", found.stderr


def test_a_package_that_is_not_there_is_named_with_what_installs_it():
    with pytest.raises(UserError, match=r"a test: no_such_package is not installed; pip install 'ditbench\[some\]'"):
        extras.needed("no_such_package", "some", "a test")
