"""A sweep that is killed again and again, two processes at a time, its cache damaged meanwhile; then what it left is held against the
same sweep undisturbed. `python tests/run/chaos.py KILLS [SEED [OVERRIDE …]]` prints what was found.

Processes are forks of this one, which has imported all and computed nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import torch

from ditbench.harness.cli import main
from ditbench.harness.records.attempts import survey
from ditbench.harness.records.record import failed_metrics

TINY = (
    "protocol.n=6", "protocol.steps=2", "generate.batch_size=2", "calibration.n=2", "metrics.resamples=5",
    "metrics.names=[psnr,sqnr,accuracy,torchmetrics/fid_judge]", "generate.noise_floor_seeds=1", "measure.repeats=2",
    "measure.warmup=1", "measure.samples=1", "tracker=none", "name=chaos",
)  # fmt: skip
SWEEP = ("-m", "method=rtn,smoothquant,quarot", "bits=w8a8,w4a8", "seed=0,1")  # 12 runs
MOST_FILES, LONGEST_S = 40, 60.0  # that come into being before the next kill


def sweep(results_dir: Path, log: Path, arguments: tuple[str, ...] = SWEEP) -> multiprocessing.Process:
    def run() -> None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            code = main(["run", *arguments, *TINY, f"results_dir={results_dir}"])
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def damage(results_dir: Path, drawn: random.Random) -> Path | None:
    """Flip one bit of one file of the cache."""
    files = [path for path in files_in(results_dir / "cache") if "locks" not in path.parts]
    if not files:
        return None
    path = drawn.choice(sorted(files))
    try:
        content = bytearray(path.read_bytes())
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)
    except (OSError, ValueError):  # gone meanwhile, or empty
        return None
    return path


def disturbed(
    results_dir: Path, kills: int, drawn: random.Random, runs: Collection[str], arguments: tuple[str, ...] = SWEEP
) -> dict[str, int]:
    """Kill, damage, and in the end let two processes finish → what was done to it.

    A sweep that is whole before all kills are done loses a run, so that there is work to be killed at.
    """
    log, done = results_dir / "log.txt", {"kills": 0, "damaged files": 0, "runs taken away": 0, "starts": 0}
    results_dir.mkdir()
    pair: list[multiprocessing.Process | None] = [None, None]
    while done["kills"] < kills:
        if not unfinished(results_dir) and set(numbers(results_dir)) == set(runs):
            take_away(results_dir, drawn)
            done["runs taken away"] += 1
        for place in range(2):
            if pair[place] is None or not pair[place].is_alive():
                pair[place] = sweep(results_dir, log, arguments)
                done["starts"] += 1
        wait_for_files(results_dir, drawn.randrange(MOST_FILES))
        time.sleep(drawn.uniform(0, 0.2))
        victim = pair[drawn.randrange(2)]
        if victim is not None and victim.is_alive():
            victim.kill()
            victim.join()
            done["kills"] += 1
        if drawn.random() < 0.5:
            done["damaged files"] += damage(results_dir, drawn) is not None
    for process in filter(None, pair):
        process.join()
    for _ in range(3):  # what was damaged under a reader's hands is completed by the same command
        if not unfinished(results_dir):
            break
        last = [sweep(results_dir, log, arguments) for _ in range(2)]
        done["starts"] += 2
        for process in last:
            process.join()
    return done


def take_away(results_dir: Path, drawn: random.Random) -> None:
    """A run, and the samples that it drew."""
    record = drawn.choice(sorted(survey(results_dir).records, key=lambda each: each.run_id))
    shutil.rmtree(results_dir / "cache" / "samples" / record.made_from["samples"], ignore_errors=True)
    shutil.rmtree(record.folder, ignore_errors=True)


def wait_for_files(results_dir: Path, more: int) -> None:
    """Until so many files were written, or nothing comes any more."""
    start = time.monotonic()
    before = count = len(files_in(results_dir))
    while count < before + more and time.monotonic() < start + LONGEST_S:
        time.sleep(0.02)
        count = max(count, len(files_in(results_dir)))


def files_in(folder: Path) -> list[Path]:
    """Folders that go while they are looked into hold none."""
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]


def unfinished(results_dir: Path) -> bool:
    found = survey(results_dir)
    return bool(found.damaged) or any(r.status != "ok" or failed_metrics(r) for r in found.records) or not found.records


def numbers(results_dir: Path) -> dict[str, dict[str, object]]:
    """What must not depend on kills: {run id: its metrics, bits, layers and keys}."""
    fields = ("metrics", "bits", "layers", "made_from")
    return {r.run_id: {name: getattr(r, name) for name in fields} for r in survey(results_dir).records}


def differences(expected: object, found: object, where: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        names = sorted(expected.keys() | found.keys())
        return [d for n in names for d in differences(expected.get(n), found.get(n), f"{where}/{n}")]
    return [] if expected == found else [f"{where}: {str(expected)[:60]} {str(found)[:60]}"]


def leftovers(results_dir: Path) -> list[str]:
    found = [path for path in results_dir.rglob("*") if ".part" in path.name or path.suffix == ".lock"]
    return [str(path.relative_to(results_dir)) for path in found]


def chaos(folder: Path, kills: int, seed: int, arguments: tuple[str, ...] = SWEEP) -> dict[str, object]:
    calm = sweep(folder / "calm", folder / "calm.txt", arguments)
    calm.join()
    expected = numbers(folder / "calm")
    done = disturbed(folder / "chaos", kills, random.Random(seed), expected, arguments)
    found = numbers(folder / "chaos")
    return done | {
        "runs": len(expected),
        "what differs": differences(expected, found),
        "leftovers": leftovers(folder / "chaos"),
        "tracebacks": (folder / "chaos" / "log.txt").read_text().count("Traceback"),
    }


if __name__ == "__main__":
    kills, seed, *arguments = sys.argv[1:] + ["0"] * (len(sys.argv) < 3)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        result = chaos(Path(scratch), int(kills), int(seed), tuple(arguments) or SWEEP)
        print(json.dumps(result | {"seconds": round(time.monotonic() - start)}, indent=1))
