"""What bench/overhead.py makes of a stack and of seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["overhead"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["overhead"]


def code(file: str, function: str):
    return compile("", f"/x/{file}", "exec").replace(co_name=function, co_qualname=function)


DRAWS = code("harness/generation/generate.py", "draw")


@pytest.mark.parametrize(
    ("inner", "part"),
    [
        (("harness/samples/store.py", "SampleStore.publish"), "harness: store of samples"),
        (("harness/build/layer.py", "QuantLinear.forward"), "drawing"),
        (("harness/models/encoded_prompts.py", "_read"), "harness: encoded prompts on disk"),
        (("harness/models/encoded_prompts.py", "_Asked.made"), "drawing"),
        (("<frozen importlib._bootstrap>", "_find_and_load"), "start: imports"),
    ],
)
def test_a_look_counts_for_the_innermost_function_that_is_known(overhead, inner, part):
    library = code("site-packages/torch/nn/modules/module.py", "Module._call_impl")
    assert overhead.part_at_work([library, code(*inner), DRAWS]) == part


def test_what_is_imported_counts_as_start_whatever_module_it_is(overhead):
    stack = [code("harness/samples/store.py", "<module>"), code("<frozen importlib>", "_find_and_load"), DRAWS]
    assert overhead.part_at_work(stack) == "start: imports"


def test_the_share_of_the_harness_reaches_the_bar_at_the_length_that_is_said(overhead):
    found = overhead.summary({"drawing": 98.0, "harness: store of samples": 2.0, "start: imports": 10.0})
    assert found["harness"] == pytest.approx(12 / 110) and found["harness_without_start"] == pytest.approx(0.02)
    length = found["below_bar_from_s"]
    assert (10 + 0.02 * (length - 10)) / length == pytest.approx(overhead.BAR)


def test_no_length_is_said_where_the_rest_alone_is_above_the_bar(overhead):
    assert "below_bar_from_s" not in overhead.summary({"drawing": 9.0, "harness: the rest": 1.0, "start: imports": 1.0})
