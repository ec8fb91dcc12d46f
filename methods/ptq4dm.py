"""PTQ4DM (Shang et al. 2023, arXiv:2211.15736): calibrate on timesteps drawn from a skewed normal, reconstruct with QDrop.

Calibration ("NDTC"): each sample is taken at one timestep of its denoising,

    t_i ~ Normal(μ T, (σ T)²), rounded and clamped to [0, T − 1]

and the rounding is learned block by block while elements of the quantized inputs are dropped at random (QDrop):

    x̃ = x̂ where u < p, else x,   u ~ Uniform(0, 1) per element

    paper   here                   meaning
    μ       mean                   0.5; t = T − 1 is pure noise, the sampler's first step
    σ       std                    0.35
    N       samples                1,024 calibration samples
    p       input_prob, act_prob   0.5: share of quantized elements of a block's input, of its layers' inputs

Departs from the paper: T is the number of sampling steps and rows of the recorded trajectories are drawn (as many as
there are, if fewer than `samples`), conditional and unconditional ones alike; 100 iterations at a learning rate of 3e-2;
scales of static activations are learned as in PTQ4DiT's release, in which the DiT rows of this method were made; weight
ranges by its percentile search; only the blocks are reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.calibration.recording import Calibration, selected
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, STATIC_ACTIVATIONS, Form
from ditbench.harness.fitting.reconstruct import ALL_TOKENS, Reconstruction, learned_weights, reconstruct
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, needs_integers
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params(Reconstruction):
    """Defaults are those of the reference code, but for the budget of iterations."""

    mean: float = 0.5
    std: float = 0.35
    samples: int = 1024
    ranges: str = "mse"  # of weights and static activations: mse (percentile search) | minmax
    input_prob: float = 0.5
    act_prob: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.mean <= 1.0 or self.std < 0:
            raise ValueError(f"ptq4dm: mean must be in [0, 1] and std ≥ 0, got {self.mean} and {self.std}")
        if self.samples < 1:
            raise ValueError(f"ptq4dm: samples must be at least 1, got {self.samples}")
        if self.ranges not in ("mse", "minmax"):
            raise ValueError(f"ptq4dm: ranges must be mse or minmax, got {self.ranges!r}")


FORMS = {
    PUBLISHED: Form(
        {"mean": 0.4, "std": 0.4, "learning_rate": 1e-3, "batch_size": 32, "batch_tokens": ALL_TOKENS},
        ASYMMETRIC_WEIGHTS | STATIC_ACTIVATIONS,
    )
}


def select_calibration(calibration: Calibration, params: Params, seed: int) -> Calibration:
    """Rows at timesteps drawn from the normal; every recorded row is used equally often (or once less)."""
    steps, recorded = calibration.num_steps, calibration.num_rows(0)
    generator = torch.Generator().manual_seed(seed)
    wanted = min(params.samples, recorded * steps)
    step_N = draw_steps(wanted, steps, params, generator)
    row_N = torch.randperm(recorded, generator=generator)[torch.arange(wanted) % recorded]
    rows = [row_N[step_N == step].sort().values for step in range(steps)]
    chosen = f"ptq4dm mean={params.mean} std={params.std} samples={params.samples} seed={seed}"
    return selected(calibration, rows, chosen)


def draw_steps(count: int, steps: int, params: Params, generator: torch.Generator) -> Tensor:
    """The denoising step of each sample: step 0 is timestep T − 1."""
    timestep_N = params.mean * steps + params.std * steps * torch.randn(count, generator=generator)
    return steps - 1 - timestep_N.round().long().clamp(0, steps - 1)


def check_bits(bits: Bits) -> None:
    needs_integers("ptq4dm", bits.weight, bits.act)


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state = static_ranges(target, bits, calibration, ranges=params.ranges)
    return state | reconstruct(target, apply(target, state, bits, params), calibration, params)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = learned_weights(target, state, bits.weight)
    return nearest(target, bits, state, weights=weights, weight_ranges=params.ranges)
