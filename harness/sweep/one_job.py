"""One job of a sweep, in whatever process it runs: the run, a note beside the sweep which run that is, and lines for whoever looks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError, of_the_system
from ditbench.harness.common.watch import Watcher, progress_is_shown, watching
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.record import Record
from ditbench.harness.run import run
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.identity import title
from ditbench.harness.sweep.live import Live


def carried_out(config: RunConfig, number: int, overrides: Sequence[str] = ()) -> Record:
    """A job of a sweep, wherever it runs: the run, and a note beside the sweep which run it is, or why it was refused.

    Raises:
        UserError: it is refused: it cannot be.
        OSError: this machine cannot do it now (no room, a folder that may not be written): it stays missing.
    """
    assert config.sweep is not None, "it is of a sweep"
    note = JobNote(config, number, tuple(overrides))
    try:
        with watching(note):
            record = run(config)
    except OSError as error:
        raise OSError(str(of_the_system(error))) from error
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise OSError(str(error)) from error
        note.refuse(str(error))
        raise
    if not note.written:  # it was recorded already
        note.write(record.run_id)
    return record


class JobNote(Watcher):
    """Says in the sweep's folder which run a job is, as soon as it begins."""

    def __init__(self, config: RunConfig, number: int, overrides: tuple[str, ...]) -> None:
        self.home = attempts.experiment_folder(config.results_dir, config.name)
        self.stamp, self.job, self.written = config.sweep, sweeps.Job(number, overrides, title(config)), False

    def begins(self, run_id: str, title: str, folder: Path) -> None:
        self.write(run_id, before=sweeps.attempts_before(self.home, run_id))

    def refuse(self, why: str) -> None:
        with suppress(OSError):  # no room, perhaps: then it is missing
            self.write(None, refused=why)

    def write(self, run_id: str | None, **more: Any) -> None:
        assert self.stamp is not None
        sweeps.say_of_job((self.home, self.stamp), replace(self.job, run_id=run_id, **more))
        self.written = True


def shown(number: int) -> AbstractContextManager[Any]:
    """A job's lines, where nobody shows them yet: in a process of its own."""
    if progress_is_shown():
        return nullcontext()
    both = ExitStack()
    both.enter_context(watching(both.enter_context(Live(number=number))))
    return both
