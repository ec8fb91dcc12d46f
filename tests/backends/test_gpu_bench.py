import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.common.paths import CONF


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(CONF.parent) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=CONF.parent, capture_output=True, text=True
    )


@pytest.mark.usefixtures("e4m3_rows")
def test_the_gpu_bench_runs_dry_with_every_format_compiled_in_one_graph(tmp_path):
    """Tiny, in Triton's interpreter; compiled without Inductor's code. It must time nothing."""
    pytest.importorskip("triton")
    found = script("bench/gpu_blocks.py", "--dry", "--out", str(tmp_path))
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "gpu_blocks.json").read_text())["blocks"]["tiny"]
    assert {name: row["failure"] for name, row in rows.items() if "failure" in row} == {}
    assert not any("not_compiled" in row for row in rows.values())
    assert len(rows) == 9 and not any(key.endswith("_ms") for row in rows.values() for key in row)
    assert 0 < rows["W8A8"]["relative_rms_error"] < rows["FP8"]["relative_rms_error"]
    assert rows["FP8"]["relative_rms_error"] < rows["W4A8"]["relative_rms_error"] < 0.2
    assert "W4A4 rotated (int8 cores)" in (tmp_path / "gpu_blocks.md").read_text()


def test_candidates_that_the_time_does_not_suffice_for_are_named_and_the_table_is_there(tmp_path):
    pytest.importorskip("triton")
    bench = SimpleNamespace(**runpy.run_path(str(CONF.parent / "bench" / "gpu_blocks.py")))
    rows: dict = {}
    list(bench.block_times(rows, bench.DRY_SHAPES["tiny"], torch.device("cpu"), 1, limit_s=0, timed=False))
    bench.write({"device": "dry", "torch": "", "repeats": 1, "blocks": {"tiny": rows}, "roofline": {}}, tmp_path)
    assert "| W4A16 | not reached in 0 s |" in (tmp_path / "gpu_blocks.md").read_text()


def test_a_candidate_has_its_times_in_the_table_before_the_next_is_made(tmp_path, monkeypatch):
    """So that a run that is cut off keeps them. No device here: the clock, graphs and the compiler are stand-ins."""
    pytest.importorskip("triton")
    bench = SimpleNamespace(**runpy.run_path(str(CONF.parent / "bench" / "gpu_blocks.py")))
    outside = bench.keep.__globals__
    turns: list[list] = []
    monkeypatch.setitem(
        outside, "interleaved", lambda calls, repeats: turns.append([*calls]) or dict.fromkeys(calls, 2.0)
    )
    monkeypatch.setitem(outside, "captured", lambda call, device: (SimpleNamespace(replay=call), None))
    monkeypatch.setitem(outside, "replaced", lambda block, make: block)
    monkeypatch.setattr(torch, "compile", lambda module, **settings: module)
    rows: dict = {}
    made = bench.block_times(rows, bench.DRY_SHAPES["tiny"], torch.device("cpu"), 1, limit_s=60, timed=True)
    kinds = ("eager_ms", "graph_ms", "compiled_ms")
    for count in (1, 2):
        next(made)
        assert len(rows) == count and all(row[kind] == 2.0 for row in rows.values() for kind in kinds)
        bench.write({"device": "", "torch": "", "repeats": 1, "blocks": {"tiny": rows}, "roofline": {}}, tmp_path)
        assert (tmp_path / "gpu_blocks.md").read_text().count("| 2.000 | 1.00 | 2.000 | 1.00 | 2.000 | 1.00 |") == count
    assert turns == [[("bf16", kind) for kind in kinds], [(name, kind) for name in ("bf16", "W8A8") for kind in kinds]]
    *_, _ = made
    assert len(turns[-1]) == 3 * len(rows) == 3 * 9


def test_the_small_family_of_the_gpu_bench_is_drawn_outside_of_pytest_and_its_table_is_kept(tmp_path):
    """Its pipeline comes from the tests' modules; the first that imports transformers must find torchvision mended."""
    found = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path), "--dry", "family"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        cwd=CONF.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "## family: done" in summary and "## tests" not in summary
    assert all(
        f"| {method} | {label} |" in summary for method in ("rtn", "quarot") for label in ("W8A8", "W4A8", "FP8")
    )


ABSENT = ("plotly", "jinja2", "markupsafe", "pandas", "sklearn", "wandb", "torch_fidelity", "cleanfid")
BARE = f"""
import importlib.machinery, sys

finder = importlib.machinery.PathFinder
found = finder.find_spec
finder.find_spec = lambda name, *where: None if name.split(".")[0] in {ABSENT} else found(name, *where)
import pathlib
from ditbench.harness.cli import main

folder = pathlib.Path(sys.argv[1])
few = ["protocol.n=2", "protocol.steps=1", "calibration.n=2", "measure.repeats=1", "measure.warmup=0", "measure.samples=1"]
few += ["metrics=fidelity", "metrics.resamples=2", "generate.noise_floor_seeds=0", "measure.layer_errors=false"]
assert main(["run", "device=cpu", "tracker=none", f"results_dir={{folder}}", *few]) == 0
assert main(["report", "--results-dir", str(folder), "--format", "md", "--out", str(folder / "table.md")]) == 0
"""


def test_a_run_and_its_table_need_no_package_of_pages_and_trackers(tmp_path):
    """A machine with a GPU and no network: see bench/gpu.sh."""
    found = script("-c", BARE, str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "W8A8" in (tmp_path / "table.md").read_text()
