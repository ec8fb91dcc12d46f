"""Q-Diffusion (Li et al. 2023, arXiv:2302.04304): calibrate on evenly spaced timesteps, learn the rounding block by block.

Calibration: the inputs of `steps` timesteps, evenly spaced over the sampler's trajectory. Weight ranges by shrinking

    (low, high) = (1 − 0.01 i) · (min W, max W),   i = 0 … 79, the one with the least Σ |Ŵ − W|^2.4 per output channel

then, block after block, AdaRound on the block's output with inputs from the quantized blocks before it, and after that
learned step sizes of static activations (LSQ):

    Ŵ = δ · clamp(⌊W/δ⌋ + h(α) + z),   x̂ = δ_X · (clamp(round(x/δ_X) + z) − z)

    paper   here                     meaning
    α       alpha_OGg                learned rounding (`harness.quant.adaround`, `harness.fitting.reconstruct`)
    λ, b    regulariser, sharpness   0.01; 20 → 2 after a warm-up of 20 %
    δ_X     scale_G                  learned after α in `scale_iterations`, at `scale_learning_rate`
    p       scale_power              2.4, the power of the error while δ_X is learned

Departs from the paper: 100 iterations at a learning rate of 3e-2 instead of 20,000 at 1e-3, and 50 instead of 5,000 for the
step sizes; α is learned with activations already quantized (`float_inputs`; there: in float), and each block's step sizes before the next
block (there: in a second pass); only the blocks are reconstructed; the shortcut splitting is for U-Nets and has no place
in a DiT; the ranges of static activations are searched on a sample of their values. Conditional and unconditional inputs
both calibrate, as there.
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
    """Defaults are the paper's but for the budget of iterations."""

    steps: int = 20  # timesteps calibrated on
    ranges: str = "shrink"  # of weights and static activations: shrink | mse | minmax
    scale_learning_rate: float = 4e-4
    scale_iterations: int = 50
    scale_power: float = 2.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"q_diffusion: steps must be at least 1, got {self.steps}")
        if self.ranges not in ("shrink", "mse", "minmax"):
            raise ValueError(f"q_diffusion: ranges must be shrink, mse or minmax, got {self.ranges!r}")


FORMS = {
    PUBLISHED: Form(
        {
            "iterations": 20_000,
            "learning_rate": 1e-3,
            "scale_iterations": 5_000,
            "batch_size": 32,
            "batch_tokens": ALL_TOKENS,
            "float_inputs": True,
        },
        ASYMMETRIC_WEIGHTS | STATIC_ACTIVATIONS | {"calibration.n": 256},
    )
}


def select_calibration(calibration: Calibration, params: Params, seed: int) -> Calibration:
    """All rows of `steps` evenly spaced steps, the first one included; nothing of the others."""
    total = calibration.num_steps
    kept = {total * i // min(params.steps, total) for i in range(min(params.steps, total))}
    everything = torch.arange(calibration.num_rows(0))
    rows = [everything if step in kept else everything[:0] for step in range(total)]
    return selected(calibration, rows, f"q_diffusion steps={params.steps}")


def check_bits(bits: Bits) -> None:
    needs_integers("q_diffusion", bits.weight, bits.act)


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state = static_ranges(target, bits, calibration, ranges=params.ranges)
    return state | reconstruct(target, apply(target, state, bits, params), calibration, params)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = learned_weights(target, state, bits.weight)
    return nearest(target, bits, state, weights=weights, weight_ranges=params.ranges)
