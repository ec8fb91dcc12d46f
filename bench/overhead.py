"""Where the time of runs goes: drawing, fitting, metrics, measuring, and the harness, which is all the rest.

    python bench/overhead.py -m method=rtn,quarot bits=w8a8,w4a4 results_dir=FOLDER --out results/bench/overhead-NAME.json

What is not an option of this script is handed to `ditbench run`, in this process, from its first import on. A timer interrupts
the main thread a hundred times a second, and what passed since its last interrupt, as wall and as CPU time, counts for the
part that is at work: that of the innermost function which PARTS knows, or the start of the process if something is being imported.
What the CPU did in other threads counts by the thread's name, and what nobody claims is the harness's. Wall time counts what
waits, for a disk or a busy core, too; shares of CPU time do not. What Python takes before its first line is in the start;
what it takes to leave, and W&B's own process, are not in it.

torch computes in one thread, whose numbers a second machine can be held against: more of them spin while they wait.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from time import process_time, thread_time, time
from types import CodeType, FrameType

import psutil

START = "start: imports"  # once a process, however many runs follow
REST = "harness: the rest"
TELLING = "harness: records, trackers, report"
DRAWING, FITTING, METRICS, MEASURING = "drawing", "fitting", "metrics", "measuring: latency, parity, layer errors"
# (part, pattern of "file:function"), the first that matches.
PARTS = (
    ("harness: store of samples", r"harness/samples/(store|pixels|rows_on_disk)\.py|site-packages/PIL/"),
    (DRAWING, r"encoded_prompts\.py:_Asked\.made$"),
    ("harness: encoded prompts on disk", r"harness/models/encoded_prompts\.py"),
    (
        "harness: hashes, locks, artifacts",
        r"harness/common/(artifacts|file_hashes|files|scratch|code_identity|tensor_files)\.py",
    ),
    ("harness: recordings on disk", r"harness/calibration/(on_disk|recorder)\.py"),
    (TELLING, r"harness/(records|report)/|:save_artifacts$"),
    ("harness: configuration", r"site-packages/(hydra|omegaconf)/|harness/sweep/|harness/stages/(config|values)\.py"),
    ("harness: loading the model", r":model_of$|harness/models/(loading|checkpoint|identity)"),
    (DRAWING, r"harness/(generation/|models/(families/|prompted|decoding))"),
    (METRICS, r"/eval/|harness/scoring/"),
    (MEASURING, r"harness/(measurement/|models/macs\.py)"),
    (FITTING, r"/methods/|harness/(fitting|calibration)/|harness/build/build\.py|stages/states\.py"),
)
THREADS = {"ThreadPoolExecutor": "harness: threads that encode, read and hash", "tracker": TELLING}
DONE_FOR_THE_USER = (DRAWING, FITTING, METRICS, MEASURING)
IMPORTING = "_find_and_load"
BAR = 0.05


@cache
def part_of_function(code: CodeType) -> str | None:
    place = f"{code.co_filename}:{code.co_qualname}"
    return next((part for part, pattern in PARTS if re.search(pattern, place)), None)


def part_at_work(codes: list[CodeType]) -> str:
    """codes: of the functions on a stack, innermost first → the part that the innermost known one belongs to."""
    if any(code.co_name == IMPORTING for code in codes):
        return START
    return next(filter(None, map(part_of_function, codes)), REST)


def part_of_thread(name: str) -> str:
    return next((part for start, part in THREADS.items() if name.startswith(start)), REST)


def cpu_of_thread(native_id: int) -> float | None:
    """Seconds, as Linux counts them; None if the thread is over, or the system does not tell."""
    try:
        return int(Path(f"/proc/self/task/{native_id}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError):
        return None


def codes_of(frame: FrameType | None) -> list[CodeType]:
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    return codes


class Watch:
    """Adds up {part: seconds} from the start of this process until `end`; for the main thread.

    An interrupt is answered between two steps of Python, so that what a long call into C took counts for who called it. (A thread
    that looks at the main one is let in when that calls C, and would count what Python did before for it; 3.11 crashes now and then.)
    """

    def __init__(self, rate: int) -> None:
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)
        self._last_wall_s, self._last_cpu_s = psutil.Process().create_time(), 0.0
        self._threads_s: dict[threading.Thread, float] = {}
        self._looks, self._pause_s = 0, 1 / rate

    def start(self) -> None:
        signal.signal(signal.SIGALRM, lambda _, frame: self.look(frame))
        signal.setitimer(signal.ITIMER_REAL, self._pause_s, self._pause_s)

    def look(self, frame: FrameType | None) -> None:
        part, now, used = part_at_work(codes_of(frame)), time(), thread_time()
        self.wall_s[part] += now - self._last_wall_s
        self.cpu_s[part] += used - self._last_cpu_s
        self._last_wall_s, self._last_cpu_s = now, used
        self._looks += 1
        if self._looks % 10 == 0:
            self._look_at_threads()

    def _look_at_threads(self) -> None:
        for thread in threading.enumerate():
            if thread is threading.main_thread() or (used := cpu_of_thread(thread.native_id)) is None:
                continue
            self.cpu_s[part_of_thread(thread.name)] += used - self._threads_s.get(thread, 0.0)
            self._threads_s[thread] = used

    def end(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        self.look(None)
        self._look_at_threads()
        self.cpu_s[REST] += max(0.0, process_time() - sum(self.cpu_s.values()))


def summary(seconds: dict[str, float]) -> dict[str, float]:
    """{part: seconds} → the harness's share of all, its share without the start of the process, and the length of run from
    which on the share is below the bar if the start stays what it is and the rest grows in proportion (none: never).
    """
    total = sum(seconds.values())
    start = seconds.get(START, 0.0)
    ours = sum(taken for part, taken in seconds.items() if part not in DONE_FOR_THE_USER)
    steady = (ours - start) / (total - start)
    found = {"total_s": total, "start_s": start, "harness": ours / total, "harness_without_start": steady}
    return found | ({"below_bar_from_s": start * (1 - steady) / (BAR - steady)} if steady < BAR else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where the breakdown is written, as JSON")
    parser.add_argument("--rate", type=int, default=100, help="looks a second")
    options, run = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    watch = Watch(options.rate)
    watch.start()
    code = ditbench_run(run)
    watch.end()
    kept = [argument for argument in run if not argument.startswith("results_dir=")]  # not where somebody's results lie
    found = {"command": kept, "exit": code, "device": device_name()}
    for clock, seconds in (("wall", watch.wall_s), ("cpu", watch.cpu_s)):
        found[clock] = {"seconds": dict(seconds), **summary(seconds)}
    shares = {
        part: [found[clock]["seconds"].get(part, 0.0) / found[clock]["total_s"] for clock in ("wall", "cpu")]
        for part in watch.wall_s | watch.cpu_s
    }
    for part, (of_wall, of_cpu) in sorted(shares.items(), key=lambda item: -item[1][0]):
        print(f"{part:45} {of_wall:7.1%} of wall {of_cpu:7.1%} of CPU")
    for clock in ("wall", "cpu"):
        print(clock, {name: round(value, 3) for name, value in found[clock].items() if name != "seconds"})
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def device_name() -> str:
    import torch

    from ditbench.harness.common.devices import device_name

    return device_name(torch.device("cpu"))


def ditbench_run(arguments: list[str]) -> int:
    from ditbench.harness.cli.command_line import main as ditbench

    return ditbench(["run", *arguments])


if __name__ == "__main__":
    main()
