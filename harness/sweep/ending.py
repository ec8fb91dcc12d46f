"""How a command ends: the table of what is recorded, a line for each run that is none of it, an exit code.

All of it is read from records and from what the sweep's jobs noted, so it is the same whoever carried the jobs out, and where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError, lines_of
from ditbench.harness.common.watch import say
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.record import Record
from ditbench.harness.records.sweeps import DONE, FAILED, MISSING, REFUSED, RUNNING, Outcome, Sweep
from ditbench.harness.report import comparison_table

Heard = Mapping[int, tuple[str, str]]  # {number of a job: REFUSED or MISSING, and why}, from who carried it out


def ended(made: Sequence[Sweep], heard: Heard, nowhere: Sequence[UserError] = ()) -> int:
    """Of sweeps that went to their end → exit code. heard: counts only for jobs that left nothing. nowhere: why jobs were refused that
    belong to no experiment.

    Raises:
        UserError: the last of the jobs that were refused.
    """
    found = [_with_reason(each, heard) for each in _outcomes(made)]
    not_done = [each for each in found if each.state not in (DONE, REFUSED)]
    refused = [*nowhere, *(UserError(each.why) for each in found if each.state == REFUSED)]
    return told(_records(found), not_done, refused)


@contextmanager
def table_on_interrupt(made: Sequence[Sweep]) -> Iterator[None]:
    """An interruption inside the block prints what is done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        found = _outcomes(made)
        if records := _records(found):
            print(comparison_table(records))
        names = " or ".join(f"`ditbench retry {sweep.experiment}`" for sweep in made)
        done = sum(each.state == DONE for each in found)
        say(f"{done} of {len(found)} runs are done; {names} does the others, and so does the same command")
        raise


def told(records: Sequence[Record], not_done: Sequence[Outcome], refused: Sequence[UserError]) -> int:
    """Print the table, then a line for each run that is none of it → exit code.

    Raises:
        UserError: the last of those that were refused.
    """
    for home in {each.folder.parent for each in records if each.folder is not None}:
        attempts.clear(home)  # whoever found all of its runs recorded began none, and so cleared nothing of the killed
    if records:
        with suppress(BrokenPipeError):  # who reads no further gets the exit code all the same
            print(comparison_table(list(records)), flush=True)
    otherwise = {RUNNING: "another process does it", MISSING: "it left no record", FAILED: ""}
    for each in not_done:
        say(f"{each.state}: {each.job.title}: {each.why or otherwise[each.state]}")
    if refused:
        *others, last = {str(error): error for error in refused}.values()
        for error in others:
            say(f"ditbench: {lines_of(error)}")
        raise last
    return EXIT_FAILED_RUNS if not_done else 0


def _outcomes(made: Sequence[Sweep]) -> list[Outcome]:
    return [each for sweep in made for each in sweeps.outcomes(sweeps.read(sweep.home, sweep.stamp))]


def _with_reason(outcome: Outcome, heard: Heard) -> Outcome:
    if outcome.state != MISSING or outcome.job.number not in heard:
        return outcome
    state, why = heard[outcome.job.number]
    return replace(outcome, state=state, why=why)


def _records(found: Sequence[Outcome]) -> list[Record]:
    return list({each.record.folder: each.record for each in found if each.record is not None}.values())
