"""Where the wall time of runs goes: drawing, fitting, metrics, measuring, and the harness, which is all the rest.

    pip install py-spy
    python bench/overhead.py -m method=rtn,quarot bits=w8a8,w4a4 --out results/bench/overhead.json

What is not an option of this script is handed to `ditbench run`. py-spy looks at the main thread a hundred times a second
from outside; each look counts for the innermost frame that PARTS knows. A thread that waits counts too, as wall time does.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# The innermost frame of a look that matches says what was being done: (part, pattern of "function (file").
PARTS = (
    ("harness: store of samples", r"\(.*harness/samples/"),
    (
        "harness: hashes and locks",
        r"\(.*harness/common/(artifacts|file_hashes|files|scratch|code_identity|tensor_files)",
    ),
    ("harness: recordings on disk", r"\(.*harness/calibration/(on_disk|recorder)"),
    ("harness: records and trackers", r"\(.*harness/(records|report)/"),
    ("harness: saving samples, report", r"^save_artifacts \("),
    ("harness: configuration", r"\(.*(site-packages/(hydra|omegaconf)/|harness/sweep/(compose|overrides))"),
    ("drawing", r"\(.*harness/(generation/|models/families/|models/prompted)"),
    ("metrics", r"\(.*/eval/|\(.*harness/scoring/"),
    ("measuring: latency, parity, layer errors", r"\(.*harness/measurement/"),
    ("fitting", r"\(.*(ditbench|src)/.*/?(methods|fitting|calibration)/|\(.*harness/(build|quant)/"),
    ("loading the model", r"^model_of \(|\(.*harness/models/(loading|checkpoint|identity)"),
    ("harness: imports", r"^<module> \(|^_find_and_load "),
)
DONE_FOR_THE_USER = ("drawing", "fitting", "metrics", "measuring: latency, parity, layer errors")


def part_of(stack: list[str]) -> str:
    """stack: frames, outermost first → the part that the innermost known frame belongs to."""
    for frame in reversed(stack):
        for part, pattern in PARTS:
            if re.search(pattern, frame):
                return part
    return "harness: the rest"


def breakdown(collapsed: str, rate: int) -> dict[str, float]:
    """collapsed: py-spy's raw format, "frame;frame;frame count" a line → seconds of each part in the main thread."""
    looks: Counter[str] = Counter()
    for line in collapsed.splitlines():
        stack, count = line.rsplit(" ", 1)
        looks[part_of(stack.split(";"))] += int(count)
    return {part: looks[part] / rate for part, _ in looks.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where the breakdown is written, as JSON")
    parser.add_argument("--rate", type=int, default=100, help="looks a second")
    options, run = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        looks = Path(scratch) / "looks"
        spy = ["py-spy", "record", "--idle", "--full-filenames", "-r", str(options.rate), "-f", "raw", "-o", str(looks)]
        subprocess.run([*spy, "--", sys.executable, "-m", "ditbench", "run", *run], check=True)
        found = breakdown("\n".join(main_thread(looks.read_text())), options.rate)
    total = sum(found.values())
    for part, seconds in found.items():
        print(f"{part:45} {seconds:8.1f} s {seconds / total:7.1%}")
    harness = sum(seconds for part, seconds in found.items() if part not in DONE_FOR_THE_USER)
    print(f"{'harness in all':45} {harness:8.1f} s {harness / total:7.1%} of {total:.1f} s")
    if options.out:
        options.out.write_text(
            json.dumps({"command": run, "seconds": found, "harness": harness / total}, indent=1) + "\n"
        )


def main_thread(collapsed: str) -> list[str]:
    """Of py-spy's lines those of the thread that runs the command."""
    return [line for line in collapsed.splitlines() if "harness/cli" in line or "<module>" in line.split(";")[0]]


if __name__ == "__main__":
    main()
