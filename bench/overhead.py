"""Where the time of runs goes: drawing, fitting, metrics, measuring, and the harness, which is all the rest.

    python bench/overhead.py -m method=rtn,quarot bits=w8a8,w4a4 results_dir=FOLDER --out results/bench/overhead-NAME.json

What is not an option of this script is handed to `ditbench run`, in this process, from its first import on. A thread looks
a hundred times a second at what every thread does, and adds what passed since its last look to the part that is at work: that of
the innermost function which PARTS knows, or the start of the process if something is being imported. Of wall time only the main
thread's counts; of CPU time each thread's own (samples are encoded and trackers told in threads), and what torch's threads
use goes to the main thread's part. Wall time counts what waits, for a disk or a busy core, too; shares of CPU time do not.
What Python takes before its first line is in the start; what it takes to leave, and W&B's own process, are not in it.

Set OMP_NUM_THREADS=1 for numbers that a second machine can be held against: torch's threads spin while they wait.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from time import process_time, time
from types import CodeType, FrameType

import psutil

START = "start: imports"  # once a process, however many runs follow
REST = "harness: the rest"
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
    ("harness: records, trackers, report", r"harness/(records|report)/|:save_artifacts$"),
    ("harness: configuration", r"site-packages/(hydra|omegaconf)/|harness/sweep/|harness/stages/(config|values)\.py"),
    ("harness: loading the model", r":model_of$|harness/models/(loading|checkpoint|identity)"),
    (DRAWING, r"harness/(generation/|models/(families/|prompted|decoding))"),
    (METRICS, r"/eval/|harness/scoring/"),
    (MEASURING, r"harness/(measurement/|models/macs\.py)"),
    (FITTING, r"/methods/|harness/(fitting|calibration)/|harness/build/build\.py|stages/states\.py"),
)
DONE_FOR_THE_USER = (DRAWING, FITTING, METRICS, MEASURING)
IMPORTING = "_find_and_load"
LOOK_WITHIN_S = 2e-4  # Python's own 5 ms would put off looks until the main thread calls torch, which would then count for all before
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


class Watch(threading.Thread):
    """Adds up {part: seconds} from the start of this process until `end`; made by the main thread."""

    def __init__(self, rate: int) -> None:
        super().__init__(daemon=True)
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)
        self._main, self._pause, self._over = threading.main_thread(), 1 / rate, threading.Event()
        self._last_wall_s, self._last_cpu_s, self._threads_s = psutil.Process().create_time(), 0.0, {}

    def run(self) -> None:
        while not self._over.wait(self._pause):
            self.look()

    def look(self) -> None:
        frames = sys._current_frames()
        now, used = time(), process_time()
        work = part_at_work(codes_of(frames[self._main.ident]))
        self.wall_s[work] += now - self._last_wall_s
        of_main_s = used - self._last_cpu_s
        for thread in threading.enumerate():
            if thread is self._main or (own_s := cpu_of_thread(thread.native_id)) is None:
                continue
            passed_s = own_s - self._threads_s.get(thread, 0.0)
            self._threads_s[thread] = own_s
            of_main_s -= passed_s
            if thread is not self and thread.ident in frames:
                self.cpu_s[part_at_work(codes_of(frames[thread.ident]))] += passed_s
        self.cpu_s[work] += of_main_s
        self._last_wall_s, self._last_cpu_s = now, used

    def end(self) -> None:
        self._over.set()
        self.join()


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
    sys.setswitchinterval(LOOK_WITHIN_S)
    watch = Watch(options.rate)
    watch.start()
    code = ditbench_run(run)
    watch.end()
    kept = [argument for argument in run if not argument.startswith("results_dir=")]  # not where somebody's results lie
    found = {"command": kept, "exit": code, "device": device_name()}
    for clock, seconds in (("wall", watch.wall_s), ("cpu", watch.cpu_s)):
        found[clock] = {"seconds": dict(seconds), **summary(seconds)}
    shares = {part: [found[c]["seconds"][part] / found[c]["total_s"] for c in ("wall", "cpu")] for part in watch.wall_s}
    for part, (of_wall, of_cpu) in sorted(shares.items(), key=lambda item: -item[1][0]):
        print(f"{part:45} {watch.wall_s[part]:8.1f} s {of_wall:7.1%} of wall {of_cpu:7.1%} of CPU")
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
