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


def test_what_the_main_thread_does_counts_between_two_looks(overhead):
    watch = overhead.Watch(rate=200)
    watch.look(None)  # what was before
    watch.start()
    scope = {}
    source = "def publish(until, time):\n    while time() < until: pass"
    exec(compile(source, "/x/harness/samples/store.py", "exec"), scope)
    try:
        scope["publish"](time.perf_counter() + 0.3, time.perf_counter)
    finally:
        watch.end()
    assert 0.2 < watch.wall_s["harness: store of samples"] < 5
    assert 0 < watch.cpu_s["harness: store of samples"] <= watch.wall_s["harness: store of samples"] + 0.05


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux says what each thread uses")
def test_what_other_threads_use_counts_by_their_names(overhead):
    over, watch = threading.Event(), overhead.Watch(rate=100)

    def compute() -> None:
        while not over.is_set():
            pass

    busy = threading.Thread(target=compute, daemon=True, name="ThreadPoolExecutor-0_0")
    busy.start()
    part, start = "harness: threads that encode, read and hash", time.monotonic()
    while watch.cpu_s[part] < 0.1 and time.monotonic() < start + 60:
        time.sleep(0.02)
        watch._look_at_threads()
    over.set()
    busy.join()
    assert watch.cpu_s[part] >= 0.1


def test_all_time_from_the_start_of_the_process_counts(overhead):
    watch = overhead.Watch(rate=100)
    watch.end()
    assert sum(watch.wall_s.values()) == pytest.approx(time.time() - psutil.Process().create_time(), abs=0.5)
    assert sum(watch.cpu_s.values()) == pytest.approx(time.process_time(), abs=0.5)
