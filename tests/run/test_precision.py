"""No float32 is computed in TF32 or bfloat16 by accident, whoever asked torch for it before."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness import run as the_run
from ditbench.harness.common.precision import compute_float32_in_float32, float32_precision

BEFORE = {
    "torch's default": "pass",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "old and new": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "everything": "torch.backends.fp32_precision = 'tf32'",
    "cudnn": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "oneDNN": "torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
}
SCRIPT = """
import json, os, sys, traceback
import torch
from ditbench.eval.features import full_precision
from ditbench.harness.common.precision import compute_float32_in_float32, float32_precision

def becomes_float32(before):
    exec(before)
    assert float32_precision() != "float32"
    compute_float32_in_float32()
    assert float32_precision() == "float32", float32_precision()
    with full_precision():
        assert float32_precision() == "float32", float32_precision()
    assert float32_precision() == "float32", float32_precision()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32

said = {}
for case, before in json.loads(sys.argv[1]).items():
    reads, writes = os.pipe()
    if not os.fork():
        try:
            becomes_float32(before)
        except BaseException:
            os.write(writes, traceback.format_exc().encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        said[case] = told.read()
    os.wait()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """{case: what went wrong}, each in a process where torch is as it was imported: forks of one."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(BEFORE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", BEFORE)
def test_float32_is_float32_whatever_was_set_before(case, said):
    assert said[case] == ""


def test_a_run_sets_it_before_it_loads_a_model(monkeypatch):
    class Loaded(Exception):
        pass

    def model_of(spec):
        assert float32_precision() == "float32"
        raise Loaded

    monkeypatch.setattr(the_run, "model_of", model_of)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(Loaded):
            the_run.run(SimpleNamespace(model=None))
    finally:
        compute_float32_in_float32()
