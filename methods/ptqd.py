"""PTQD (He et al. 2023, arXiv:2305.10657): the error of a quantized model's noise estimate, split and corrected.

At every denoising step t the error of the quantized estimate ε̂ is a part that is proportional to ε, a bias and the rest:

    ε̂ − ε = k_t ε + bias_{t,c} + residual,      corrected:  (ε̂ − bias_{t,c}) / (1 + k_t)

    paper       here             meaning
    k_t         slope_S          of a linear regression of the error on ε, one per step
    bias        bias_Sc          mean of the error, per step and channel c of the noise
    σ_q(t)      residual_std_S   standard deviation of ε̂ − ε − k_t ε, the mean over samples

An ancestral sampler (DDPM) adds noise of variance σ_t²; the residual adds its own, and so less is added:

    σ_t'² = max(0, σ_t² − c_t² σ_q²),   c_t: the weight of ε̂ in the step's mean

The statistics are taken in `fit` from the calibration's inputs, given to the float model and to the quantized one;
`correct_step` corrects the sampler's estimate, `correct_variance` what it adds. With guidance they are those of the
conditional and the null rows together, and the guided estimate null + w (conditional − null) is corrected: its weights w
and 1 − w sum to one, so k_t and a bias that both rows share are those of the guided estimate as well.

So the release does it: one intercept beside the slope, k_t ≤ 0 counts as 0 (correction=release). Ours, correction=joint: slope and
bias of one regression with an intercept per channel, so that biases do not leak into k_t and the bias is of what the slope leaves;
negative slopes count, down to 1 + k_t = `least_gain` (below, dividing would only amplify noise); and σ_q / (1 + k_t) is taken off, the
residual of the estimate as corrected.

Departs from the paper: by default weights are rounded to nearest with min-max ranges (form=published: AdaRound by block, as BRECQ,
10,000 iterations, then 5,000 for the scales of activations, and one weight range per tensor, as in its scripts); first and last layers
are as the protocol says (the paper: 8 bits); c_t is DDPM's own, which equals the paper's (written for DDIM with noise) where σ_t² is the
posterior's; statistics are those of the single estimates (the release: of the guided one), on the recorded trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.progress import progress
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, STATIC_ACTIVATIONS, Form
from ditbench.harness.fitting.reconstruct import ALL_TOKENS, Reconstruction, learned_weights, reconstruct
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params(Reconstruction):
    """slope, bias and variance switch the corrections off one by one."""

    reconstruct: str = "none"
    correction: str = "release"  # release | joint
    slope: bool = True
    bias: bool = True
    variance: bool = True  # of samplers that add noise; DDIM adds none
    least_gain: float = 0.5  # of correction=joint: least 1 + k_t that is divided by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction not in ("release", "joint"):
            raise ValueError(f"ptqd: correction must be release or joint, got {self.correction!r}")
        if not 0.0 < self.least_gain <= 1.0:
            raise ValueError(f"ptqd: least_gain must be above 0 and at most 1, got {self.least_gain}")


FORMS = {
    PUBLISHED: Form(
        {
            "reconstruct": "block",
            "iterations": 10_000,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "batch_tokens": ALL_TOKENS,
            "float_inputs": True,
            "scale_iterations": 5_000,
            "scale_learning_rate": 4e-4,
            "scale_power": 2.4,
        },
        ASYMMETRIC_WEIGHTS | STATIC_ACTIVATIONS | {"bits.weight.granularity": "per_tensor", "calibration.n": 64},
    ),
    "joint": Form({"correction": "joint"}),
}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    exact = float_copy(target, dtype=torch.float32, device=target.device)
    with torch.no_grad():
        estimate = calibration.call(exact, 0, calibration.rows(0, 1)).sample
    if estimate.ndim != 4:
        raise UserError(
            f"ptqd is defined for image latents (B, c, h, w); this model's are {estimate.ndim}-dimensional (videos, or "
            "packed tokens): use another method with it"
        )
    state = static_ranges(target, bits, calibration)
    state |= reconstruct(target, apply(target, state, bits, params), calibration, params)
    quantized = build(target, apply(target, state, bits, params), dtype=torch.float32, device=target.device)
    channels = target.transformer.config.in_channels
    slopes, biases, residuals = [], [], []
    for step in progress(range(calibration.num_steps), desc="noise errors"):
        expected_Bchw, noise_Bchw = (
            noise_estimates(model, calibration, step, channels) for model in (exact, quantized)
        )
        slope, bias_c, residual_std = error_statistics(expected_Bchw, noise_Bchw, params)
        slopes.append(slope)
        biases.append(bias_c)
        residuals.append(residual_std)
    statistics = {"slope_S": slopes, "bias_Sc": biases, "residual_std_S": residuals}
    return state | {name: torch.stack(values).cpu() for name, values in statistics.items()}


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, weights=learned_weights(target, state, bits.weight))


def correct_step(state: dict[str, Tensor], params: Params, step: int, noise: Tensor) -> Tensor:
    """The guided estimate (B, c, h, w) of one step → the corrected one."""
    bias_c = state["bias_Sc"][step].to(noise)
    gain = (1 + state["slope_S"][step]).to(noise)
    return (noise - bias_c[:, None, None]) / gain


def correct_variance(state: dict[str, Tensor], params: Params, step: int, variance: Tensor, weight: Tensor) -> Tensor:
    """σ² less what the corrected estimate's residual adds; nothing below 0."""
    if not params.variance:
        return variance
    residual_std = state["residual_std_S"][step].to(variance)
    if params.correction == "joint":
        residual_std = residual_std / (1 + state["slope_S"][step]).to(variance)
    return (variance - (weight.to(variance) * residual_std) ** 2).clamp(min=0)


@torch.no_grad()
def noise_estimates(
    model: nn.Module, calibration: Calibration, step: int, channels: int, batch_size: int | None = None
) -> Tensor:
    """The model's estimates (B, c, h, w) on all recorded rows of one step, without a learned variance; float64."""
    batches = calibration.batches(batch_size, steps=[step])
    return torch.cat([calibration.call(model, step, rows).sample[:, :channels].double() for _, rows in batches])


def error_statistics(expected_Bchw: Tensor, noise_Bchw: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """k, bias_c and the residual's standard deviation at one step."""
    error_Bchw = noise_Bchw - expected_Bchw
    joint, over = params.correction == "joint", (0, 2, 3)
    centred = expected_Bchw - expected_Bchw.mean(over if joint else (0, 1, 2, 3), keepdim=True)
    slope = (centred * error_Bchw).sum() / centred.square().sum().clamp(min=torch.finfo(centred.dtype).tiny)
    slope = slope.clamp(min=params.least_gain - 1 if joint else 0.0) if params.slope else torch.zeros_like(slope)
    rest_Bchw = error_Bchw - slope * expected_Bchw
    bias_c = (rest_Bchw if joint else error_Bchw).mean(over) if params.bias else rest_Bchw.new_zeros(rest_Bchw.shape[1])
    if joint:
        return slope, bias_c, (rest_Bchw - bias_c[:, None, None]).std()
    return slope, bias_c, rest_Bchw.flatten(1).std(1).mean()
