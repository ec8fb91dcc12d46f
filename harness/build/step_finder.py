"""The denoising step of a loaded export: found from the timestep that its transformer is called with.

No call is counted, so it does not matter which pipeline calls, where it starts (image to image), whether it calls once or twice
a step, or whether an earlier run was broken off. What a step's timestep was is kept with the tables (`Schedule`), in the
transformer's own scale, whatever that is (0 … 1000, 0 … 1, rising or falling).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.quant.blocks import by_name
from ditbench.harness.quant.steps import StepClock

TIME_ARGUMENTS = ("timestep", "timesteps", "t", "sigma")  # what transformers call it
SAME = 1e-5  # of the largest timestep: what schedulers of two devices or versions differ by


@dataclass(frozen=True)
class Schedule:
    """argument: of the transformer's forward, its noise level. timesteps: what it was at each step, in sampling order."""

    argument: str
    timesteps: tuple[float, ...]

    @property
    def falling(self) -> bool:
        return self.timesteps[0] >= self.timesteps[-1]

    def nearest(self, timestep: float) -> int:
        """The step whose timestep is nearest; the first of equals."""
        return min(range(len(self.timesteps)), key=lambda step: abs(self.timesteps[step] - timestep))


def time_argument(arguments: Mapping[str, Any]) -> str | None:
    """The argument of a transformer's call that says the noise level, if it is known."""
    return next((name for name in TIME_ARGUMENTS if name in arguments), None)


def noisiest(value: Any, falling: bool = True) -> float:
    """The one timestep of a call: rows and tokens share it, but for tokens that are given (the first frame of a video from an
    image), which have less noise. value: a number, or a tensor of any shape.

    falling: whether timesteps fall while noise is taken away.

    Raises:
        ValueError: no number.
    """
    if isinstance(value, Tensor) and value.numel():
        values = value.detach().double()
        return float(values.max() if falling else values.min())
    if isinstance(value, int | float):
        return float(value)
    raise ValueError(f"a timestep is a number or a tensor, got {type(value).__name__}")


class StepFinder:
    """A forward pre-hook that sets the clock to the step that was fitted at the call's timestep.

    nearest: calls between the timesteps of the schedule take the nearest step; without it they are refused.
    """

    def __init__(self, schedule: Schedule, clock: StepClock, *, nearest: bool = False) -> None:
        self.schedule, self.clock, self.takes_nearest = schedule, clock, nearest

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.enter, with_kwargs=True)

    @torch._disable_dynamo  # reads a value; torch.compiler.disable would import the whole compiler here
    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = by_name(model, args, kwargs).get(self.schedule.argument)
        timestep = noisiest(value, self.schedule.falling)
        self.clock.set(self.step_at(timestep, getattr(value, "dtype", torch.float32)), len(self.schedule.timesteps))

    def step_at(self, timestep: float, dtype: torch.dtype = torch.float32) -> int:
        """dtype: of the call's argument; pipelines round it with their latents.

        Raises:
            ValueError: the schedule has no step at this timestep.
        """
        fitted = self.schedule.timesteps
        step = self.schedule.nearest(timestep)
        rounding, largest = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0, max(map(abs, fitted))
        # a rising scale is 1 − what falls, so it carries the rounding of the larger number
        allowed = rounding * (abs(timestep) if self.schedule.falling else largest) + SAME * largest
        if self.takes_nearest or abs(fitted[step] - timestep) <= allowed:
            return step
        raise ValueError(
            f"this export has tables for {len(fitted)} denoising steps ({self.schedule.argument} {shown(fitted)}), and its "
            f"transformer was called at {timestep:g}; draw with num_inference_steps={len(fitted)}, the scheduler and the size "
            "that it was made with, or load it with nearest=True"
        )


def shown(values: tuple[float, ...]) -> str:
    """951, 901, … 1"""
    return ", ".join(f"{value:g}" for value in values[:2]) + (f", … {values[-1]:g}" if len(values) > 2 else "")


class StepCounter:
    """Of exports without a schedule (format version 1): counts the steps of the scheduler of the pipeline that it was loaded into.

    A pipeline that starts in the middle is followed where its scheduler says so (`begin_index`).
    """

    def __init__(self, pipeline: Any, clock: StepClock) -> None:
        self.pipeline, self.clock = pipeline, clock
        self.scheduler: Any = None
        self.step = 0

    def attach(self, model: nn.Module) -> None:
        self.watch()
        model.register_forward_pre_hook(self.enter)

    def watch(self) -> None:
        """Count the pipeline's scheduler's steps from here on."""
        self.scheduler, self.step = self.pipeline.scheduler, 0
        set_timesteps, step = self.scheduler.set_timesteps, self.scheduler.step

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def restart(*args: Any, **kwargs: Any) -> Any:
            self.step = 0
            return set_timesteps(*args, **kwargs)

        @functools.wraps(step)
        def count(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.step += 1
            return result

        self.scheduler.set_timesteps, self.scheduler.step = restart, count

    def enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Raises ValueError: more steps than its scheduler has."""
        if self.pipeline.scheduler is not self.scheduler:  # put in after the export was loaded
            self.watch()
        steps = len(self.scheduler.timesteps)
        step = self.step + (getattr(self.scheduler, "begin_index", None) or 0)
        if step >= steps:
            raise ValueError(
                f"this export was written without its timesteps, so the steps of one pipeline are counted, and its {steps} are "
                "over; does another pipeline call its transformer? export it again"
            )
        self.clock.set(step, steps)
