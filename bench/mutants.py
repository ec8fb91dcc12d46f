"""Do the tests see small mistakes in what decides a number? Each mistake of tests/mutants.yaml is made in a copy of the checkout.

    python bench/mutants.py                      # all, one after the other; prints killed or survived for each, and how many
    python bench/mutants.py --only 3 17          # some, by their number
    python bench/mutants.py --file eval/flow.py  # those of one file

A mutant is killed if the tests that it names fail. That they pass without it is looked at first, since a test that always fails kills
everything. Tests of a library that is not installed are skipped, and what they alone see survives. Exits with 1 if one survived, or if its
tests could not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.yaml"
KILLED, SURVIVED, TIMED_OUT, NOT_RUN = "killed", "SURVIVED", "killed (timed out)", "TESTS DID NOT RUN"
OUTCOMES = {0: SURVIVED, 1: KILLED}  # by pytest's exit status; others: no test was collected, or one cannot be imported
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Mutant:
    """text stands once in file; becomes: what is written there instead; breaks: what is right; tests: the files that see it."""

    file: str
    text: str
    becomes: str
    breaks: str
    tests: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tests", tuple(self.tests))

    def changed(self, source: str) -> str:
        """Raises ValueError: the text is not there, or more than once."""
        if (count := source.count(self.text)) != 1:
            raise ValueError(
                f"{LIST.name}: expected {self.text!r} once in {self.file}, found it {count} times; follow the change there"
            )
        return source.replace(self.text, self.becomes)


def mutants() -> list[Mutant]:
    return [Mutant(**fields) for fields in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def copied_checkout(folder: Path) -> Path:
    """The files that git knows, or could know, with links as they are."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():  # deleted ones are listed too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def status_of(tests: tuple[str, ...], checkout: Path) -> int | None:
    """pytest's exit status, up to the first failure; None if it took too long."""
    environment = os.environ | {"PYTHONPATH": f"{checkout / 'src'}:{checkout}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        return None


def outcome_of(mutant: Mutant, checkout: Path) -> str:
    path = checkout / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.changed(source), encoding="utf-8")
    try:
        status = status_of(mutant.tests, checkout)
    finally:
        path.write_text(source, encoding="utf-8")
    return TIMED_OUT if status is None else OUTCOMES.get(status, NOT_RUN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N")
    parser.add_argument("--file")
    asked = parser.parse_args()
    numbered = [
        (number, mutant)
        for number, mutant in enumerate(mutants(), 1)
        if (asked.only is None or number in asked.only) and asked.file in (None, mutant.file)
    ]
    if not numbered:
        sys.exit(f"{LIST.name} has no such mutant; numbers go from 1 to {len(mutants())}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = copied_checkout(Path(folder))
        tests = tuple(sorted({test for _, mutant in numbered for test in mutant.tests}))
        if status_of(tests, checkout) != 0:
            sys.exit(f"without any mutant these fail already: {' '.join(tests)}")
        counts: dict[str, int] = {}
        for number, mutant in numbered:
            outcome = outcome_of(mutant, checkout)
            counts[outcome] = counts.get(outcome, 0) + 1
            print(f"{number:4}  {outcome:9}  {mutant.file}: {mutant.breaks}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), f"of {len(numbered)}")
    sys.exit(any(outcome in counts for outcome in (SURVIVED, NOT_RUN)))


if __name__ == "__main__":
    main()
