"""Schedulers by the names that a protocol uses, and one whose variance a method may correct."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from ditbench.harness.common.errors import UserError

NO_VARIANCE = 1e-20  # has a logarithm


class CorrectedDDPM(DDPMScheduler):
    """DDPM whose added variance passes `correct(σ², weight of the estimate in the mean)`, if that is set."""

    correct: Callable[[Tensor, Tensor], Tensor] | None = None

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """σ², or log σ² where the variance is learned: what `step` expects of it."""
        variance = super()._get_variance(t, predicted_variance, variance_type)
        if self.correct is None:
            return variance
        if self.config.prediction_type != "epsilon":
            raise UserError(
                f"the sampler's variance is corrected for errors of predicted noise; this model predicts a "
                f"{self.config.prediction_type}: set method.variance=false"
            )
        if (variance_type or self.config.variance_type) == "learned_range":
            return self.correct(variance.exp(), self.estimate_weight(t)).clamp(min=NO_VARIANCE).log()
        return self.correct(variance, self.estimate_weight(t)).clamp(min=0)

    def estimate_weight(self, t: int) -> Tensor:
        """c in x_{t−1} = x_t / √α_t − c ε̂ + σ z: β_t / (√α_t √(1 − ᾱ_t))."""
        before = self.previous_timestep(t)
        cumulative = self.alphas_cumprod[t]
        alpha = cumulative / (self.alphas_cumprod[before] if before >= 0 else self.one)
        return (1 - alpha) / (alpha * (1 - cumulative)).sqrt()


PIPELINE = "pipeline"  # the scheduler that the checkpoint brings
SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": CorrectedDDPM,
    "dpm++": DPMSolverMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
