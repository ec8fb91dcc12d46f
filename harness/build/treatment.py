"""What layers do to a tensor that several of them read, done once: see `shared_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "ditbench_rows"  # of the attribute of a tensor
Step = tuple[int, int | None] | None


class Treatment:
    """What some layers do to their input before they multiply it; one object for all of them."""

    def of(self, x: Tensor, step: Tensor | None, keep: bool, make: Callable[[], Any]) -> Any:
        """make(), or what it gave for another layer of this treatment if neither x nor the step has changed since.

        keep: whether x' is needed beside its codes. Nothing that make() gives may hold x itself, which would then never go.
        """
        if not lasts(x, step):
            return make()
        versions = (x._version, now(step))
        left: Left | None = getattr(x, NAME, None)
        if left is None or left.treatment is not self or left.versions != versions or (keep and not left.keeps):
            left = Left(self, versions, keep, make())
            setattr(x, NAME, left)
        return left.rows

    def leave(self, x: Tensor, at: Step, rows: Any) -> None:
        """On x, if it lasts, what `of` would make of it at that step; of an x that is no more than its rows (no transform)."""
        if lasts(x, None) and (at is None or at[1] is not None):
            setattr(x, NAME, Left(self, (x._version, at), True, rows))


def lasts(x: Tensor, step: Tensor | None) -> bool:
    """Whether something may be left on x: it will tell whether it has changed, and lives no longer than it should."""
    if torch.compiler.is_compiling() or x.is_inference() or (step is not None and step.is_inference()):
        return False  # these do not tell whether they have changed
    if torch.is_grad_enabled() and x.requires_grad:
        return False  # a graph is gone through once, and would hold x
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())  # a replay changes x and tells nobody


def now(step: Tensor | None) -> Step:
    """What another step differs in; an inference tensor does not tell whether it has changed."""
    return None if step is None else (id(step), None if step.is_inference() else step._version)


@dataclass(frozen=True)
class Left:
    """On a tensor: what a treatment made of it, of which version of it and of the step."""

    treatment: Treatment
    versions: tuple[int, Step]
    keeps: bool
    rows: Any
