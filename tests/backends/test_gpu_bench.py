import json
import os
import subprocess
import sys

import pytest

from harness.paths import CONF


@pytest.mark.usefixtures("e4m3_rows")
def test_the_gpu_bench_runs_dry_with_every_format_compiled_in_one_graph(tmp_path):
    """Tiny, in Triton's interpreter; compiled without Inductor's code. It must time nothing."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(CONF.parent) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    run = [sys.executable, "bench/gpu_blocks.py", "--dry", "--out", tmp_path]
    found = subprocess.run(run, env=environment, cwd=CONF.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "gpu_blocks.json").read_text())["blocks"]["tiny"]
    assert {name: row["failure"] for name, row in rows.items() if "failure" in row} == {}
    assert len(rows) == 9 and not any(key.endswith("_ms") for row in rows.values() for key in row)
    assert 0 < rows["W8A8"]["relative_rms_error"] < rows["FP8"]["relative_rms_error"]
    assert rows["FP8"]["relative_rms_error"] < rows["W4A8"]["relative_rms_error"] < 0.2
    assert "W4A4 (int8 cores)" in (tmp_path / "gpu_blocks.md").read_text()
