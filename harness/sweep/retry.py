"""Jobs of a sweep again: those that failed, and those that left no record."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ditbench.harness.common.errors import EXIT_FAILED_RUNS, EXIT_USER, UserError, shortened
from ditbench.harness.common.paths import configurations_in
from ditbench.harness.common.watch import say
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.sweeps import DONE, FAILED, MISSING, REFUSED
from ditbench.harness.sweep.launch import launch
from ditbench.harness.sweep.overview import no_experiment


def retry(
    results_dir: Path,
    experiment: str,
    states: Collection[str] = (FAILED, MISSING),
    overrides: Sequence[str] = (),
    stamp: str | None = None,
    debug: bool = False,
) -> int:
    """Carry out again the jobs of a sweep (the newest, if none is named) that are in these states → exit code, as of the sweep.

    overrides: more of them, for all jobs, such as another launcher. The sweep keeps its stamp and all its other jobs.

    Raises:
        UserError: no such experiment or sweep, or nothing is known of how to start its jobs.
    """
    if not attempts.is_experiment(results_dir, experiment):
        raise no_experiment(results_dir, experiment)
    home = attempts.experiment_folder(results_dir, experiment)
    sweep = sweeps.read(home, stamp) if stamp else sweeps.newest(home)
    if sweep is None:
        raise UserError(
            f"{experiment}: no sweep is known of it; give the command of its runs again, which does what is missing"
        )
    if sweep.sweeper is not None:
        raise UserError(f"{experiment}: {sweep.sweeper} chose the jobs of sweep {sweep.stamp}; give its command again")
    found = sweeps.outcomes(sweep)
    chosen = [each for each in found if each.state in states]
    if not chosen:
        say(f"sweep {sweep.stamp} of {experiment}: nothing {' or '.join(states)}")
        left = {each.state for each in found} - {DONE}
        return EXIT_USER if REFUSED in left else EXIT_FAILED_RUNS if left else 0
    say(f"sweep {sweep.stamp} of {experiment}: {len(chosen)} of {len(sweep.jobs)} jobs again")
    for each in chosen:
        say(f"  {each.state}: {each.job.title}{f': {shortened(each.why, 160)}' if each.why else ''}")
    given = ["--multirun", *sweep.hydra, *overrides, f"results_dir={_quoted(results_dir)}", *["debug=true"] * debug]
    more = [each for each in given if "=" in each and not each.startswith("hydra")]
    keys = {_key(each) for each in more}
    jobs = {
        each.job.number: [*(one for one in each.job.overrides if not _given(_key(one), keys)), *more] for each in chosen
    }
    with configurations_in(sweep.config_dirs):
        return launch(given, again=jobs, stamp=sweep.stamp)


def _given(key: str, keys: Collection[str]) -> bool:
    """Whether these hold the key, or the section that it is a setting of: another launcher has other settings."""
    return key in keys or key.partition(".")[0] in keys


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _quoted(path: Path) -> str:
    """As a value in Hydra's grammar. The folder that is meant is the one that was read, wherever the sweep was started."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
