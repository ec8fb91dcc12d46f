"""generate.dtype holds in the measurement too: the transformer is called with inputs of its own type."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("method", ["fp", "rtn"])
def test_a_measured_run_in_float32_ends_well(run, read_records, tmp_path, method):
    assert run(f"method={method}", "bits=w8a8", "generate.dtype=float32") == 0
    (record,) = read_records(tmp_path).values()
    assert record["status"] == "ok" and record["config"]["generate"]["dtype"] == "float32"
    if record["efficiency"]["kind"] == "measured":
        assert record["efficiency"]["latency_ms"]["median"] > 0
    else:
        assert method != "fp", "the 16-bit reference runs everywhere"
