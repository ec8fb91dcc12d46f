"""What bench/overhead.py makes of a stack and of seconds."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from pathlib import Path

import psutil
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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux says what each thread uses")
def test_each_thread_s_cpu_time_counts_for_what_that_thread_does(overhead):
    """Main waits for a thread that encodes samples: it is the store's time, though nobody looks at the main thread then."""
    over, started = threading.Event(), threading.Event()
    scope = {"over": over, "started": started}
    source = "def encode():\n    started.set()\n    while not over.is_set(): pass"
    exec(compile(source, "/x/harness/samples/store.py", "exec"), scope)
    busy = threading.Thread(target=scope["encode"], daemon=True)
    watch = overhead.Watch(rate=100)
    watch.look()
    before_s = watch.cpu_s.copy()
    busy.start()
    started.wait()
    while watch.cpu_s["harness: store of samples"] < 0.1:
        time.sleep(0.02)
        watch.look()
    over.set()
    busy.join()
    found = {part: spent - before_s.get(part, 0.0) for part, spent in watch.cpu_s.items()}
    assert found["harness: store of samples"] > 2 * sum(s for p, s in found.items() if p != "harness: store of samples")


def test_the_time_from_the_start_of_the_process_counts(overhead):
    watch = overhead.Watch(rate=100)
    watch.look()
    assert sum(watch.wall_s.values()) == pytest.approx(time.time() - psutil.Process().create_time(), abs=0.5)
    assert sum(watch.cpu_s.values()) <= time.process_time()
