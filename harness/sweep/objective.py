"""What a sweeper such as optuna seeks: a metric of each run (`sweep.objective`), the least or the most of it."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from ditbench.eval.base import known_metrics
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.watch import say
from ditbench.harness.records.record import Record
from ditbench.harness.records.sweeps import Outcome
from ditbench.harness.sweep.multirun import Multirun

OBJECTIVE = "sweep.objective"
MOST, LEAST = "maximize", "minimize"  # hydra.sweeper.direction; LEAST is optuna's default


def check(multirun: Multirun) -> None:
    """Raise UserError unless the sweep names one of its metrics; say it if what is sought is the worst of it."""
    objective, names = multirun.config.sweep.objective, list(multirun.config.metrics.names)
    if objective is None:
        raise UserError(
            f"{multirun.sweeper} needs a value of each run: name a metric, {OBJECTIVE}=… ({', '.join(names)})"
        )
    if objective not in names:
        raise unknown_name(f"metric of this sweep for {OBJECTIVE}", str(objective), names)
    better, direction = known_metrics()[objective].better, _direction(multirun)
    if (better, direction) in (("higher", LEAST), ("lower", MOST)):
        right = MOST if direction == LEAST else LEAST
        say(f"{objective} is better when {better}, and this sweep seeks the worst; hydra.sweeper.direction={right}?")


def value_of(record: Record, objective: str | None) -> float | None:
    """None: no objective is asked for, or the run has no value of it."""
    value = record.metrics.get(objective, {}).get("value") if objective else None
    return None if value is None else float(value)


def best(multirun: Multirun, found: Sequence[Outcome]) -> str | None:
    """A line of the run that gave the sweeper most of what it sought, with what not all runs have of its overrides."""
    objective = multirun.config.sweep.objective
    values = [(value_of(each.record, objective), each.job) for each in found if each.record is not None]
    known = [(value, job) for value, job in values if value is not None]
    if not known:
        return None
    value, job = (max if _direction(multirun) == MOST else min)(known, key=lambda each: each[0])
    common = set.intersection(*(set(each.overrides) for _, each in known))
    chosen = " ".join(each for each in job.overrides if each not in common)
    return f"best {objective} of {len(known)} runs: {value:.6g}, {chosen or job.title}"


def _direction(multirun: Multirun) -> str:
    said = multirun.config.hydra.sweeper.get("direction")
    if OmegaConf.is_list(said):
        raise UserError("hydra.sweeper.direction: one objective is sought at a time; name one direction")
    return str(getattr(said, "name", said))  # optuna's own default is an enumeration's member
