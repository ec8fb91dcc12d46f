"""PTQD (He et al. 2023, arXiv:2305.10657): the error of a quantized model's noise estimate, split and corrected.

At every denoising step t the error of the quantized estimate ε̂ is a part that is proportional to ε, a bias and the rest:

    ε̂ − ε = k_t ε + bias_{t,c} + residual,      corrected:  (ε̂ − bias_{t,c}) / (1 + k_t)

    paper       here             meaning
    k_t         slope_S          of a linear regression of the error on ε, one per step
    bias        bias_Sc          mean of what is left, per step and channel c of the noise
    σ_q(t)      residual_std_S   standard deviation of the residual
    floor       least_gain       least 1 + k_t that is divided by

An ancestral sampler (DDPM) adds noise of variance σ_t²; the residual adds its own, and so less is added:

    σ_t'² = max(0, σ_t² − c_t² (σ_q / (1 + k_t))²),   c_t: the weight of ε̂ in the step's mean

The statistics are taken in `fit` from the calibration's inputs, given to the float model and to the quantized one;
`correct_step` corrects the sampler's estimate, `correct_variance` what it adds. With guidance they are those of the
conditional and the null rows together, and the guided estimate null + w (conditional − null) is corrected: its weights w
and 1 − w sum to one, so k_t and a bias that both rows share are those of the guided estimate as well.

Departs from the paper: weights are rounded to nearest with min-max ranges (the paper: BRECQ), and first and last layers are
as the protocol says (the paper: 8 bits). σ_q is divided by 1 + k_t, as the residual is when the estimate is corrected (the
release: not), and c_t is DDPM's own, which equals the paper's (written for DDIM with noise) where σ_t² is the posterior's.
With guidance σ_q is that of the single estimates. The regression has one intercept per channel, which is the bias: with a
common one, biases would leak into k_t. Where 1 + k_t falls below `least_gain` (an estimate that has little to do with ε) it
is held there; dividing would only amplify noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params:
    """slope, bias and variance switch the corrections off one by one."""

    slope: bool = True
    bias: bool = True
    variance: bool = True  # of samplers that add noise; DDIM adds none
    least_gain: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.least_gain <= 1.0:
            raise ValueError(f"ptqd: least_gain must be above 0 and at most 1, got {self.least_gain}")


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
    quantized = build(target, apply(target, state, bits, params), dtype=torch.float32, device=target.device)
    channels = target.transformer.config.in_channels
    slopes, biases, residuals = [], [], []
    for step in tqdm(range(calibration.num_steps), desc="noise errors", leave=False):
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
    return nearest(target, bits, state)


def correct_step(state: dict[str, Tensor], params: Params, step: int, noise: Tensor) -> Tensor:
    """The guided estimate (B, c, h, w) of one step → the corrected one."""
    bias_c = state["bias_Sc"][step].to(noise)
    gain = (1 + state["slope_S"][step]).to(noise)
    return (noise - bias_c[:, None, None]) / gain


def correct_variance(state: dict[str, Tensor], params: Params, step: int, variance: Tensor, weight: Tensor) -> Tensor:
    """σ² less what the corrected estimate's residual adds; nothing below 0."""
    if not params.variance:
        return variance
    residual_std = (state["residual_std_S"][step] / (1 + state["slope_S"][step])).to(variance)
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
    over = (0, 2, 3)
    centred = expected_Bchw - expected_Bchw.mean(over, keepdim=True)
    slope = (centred * error_Bchw).sum() / centred.square().sum().clamp(min=torch.finfo(centred.dtype).tiny)
    slope = slope.clamp(min=params.least_gain - 1) if params.slope else torch.zeros_like(slope)
    rest_Bchw = error_Bchw - slope * expected_Bchw
    bias_c = rest_Bchw.mean(over) if params.bias else rest_Bchw.new_zeros(rest_Bchw.shape[1])
    return slope, bias_c, (rest_Bchw - bias_c[:, None, None]).std()
