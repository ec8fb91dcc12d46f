"""PTQ4DiT (Wu et al. 2024, arXiv:2405.16005): balance salient channels between X and W, for all timesteps at once.

CSB (Eq. 4–7): salience is the largest magnitude of a channel; both sides meet at their geometric mean

    s̃_j = √(s(X_j) s(W_j)),   B^X = diag(s̃ / s(X)),   B^W = diag(s̃ / s(W)),   (X B^X)(B^W W) = X W

SSC (Eq. 10–11): activation salience as a mean over timesteps, weighted towards those where X and W complement each other

    s_ρ(X) = Σ_t η_t s(X^(t)),   η_t = exp(−ρ_t) / Σ_t' exp(−ρ_t'),   ρ_t = Spearman(s(X^(t)), s(W))

    paper      here                meaning
    s(X^(t))   act_salience_SC     largest |x| per step and channel
    s(W)       weight_salience_C   largest |w| per input channel, over all layers that read the input
    ρ_t        spearman_S          rank correlation over channels (0 where a side is constant)
    η_t        weights_S           Σ η = 1, max η / min η ≤ e²
    (B^X)⁻¹    scale_C             what x is divided by, √(s_ρ(X) / s(W))

Re-parameterisation (Eq. 13, 18–21): folded into adaLN rows for q, k, v and the first FFN layer, into the V rows for the
output projection; none for the second FFN layer. Weight ranges by the percentile search of the release ("mse"). Then
block reconstruction: AdaRound, and learned scales of static activations (`harness.fitting.reconstruct`).

Departs from the paper: 100 iterations per block at a learning rate of 3e-2 instead of 20,000 at 1e-3 (`iterations`,
`learning_rate`), and the reported numbers depend on reconstruction; only the blocks are reconstructed, layers outside
are rounded to nearest (the release: embedders and the last layer too); the error is summed over channels (`error_over`; the
release: over dimension 1, which on a DiT are the tokens); all recorded timesteps calibrate (25 or 10 of them there); ρ_t is per
timestep as in Eq. 11 (the release: per sample row of one class); calibration classes are drawn at random (the release
sees classes 0–15 only); s(W) of q, k, v is taken over the three together, since they share B^X.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.calibration.channel_statistics import channel_stats, of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, STATIC_ACTIVATIONS, Form
from ditbench.harness.fitting.reconstruct import ALL_TOKENS, Reconstruction, learned_weights, reconstruct
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.smoothing import place, weight_absmax
from ditbench.harness.quant.spec import Bits, needs_integers
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import Transform

PARTS = ("csb+ssc", "csb", "none")


@dataclass(frozen=True)
class Params(Reconstruction):
    """Defaults are the paper's but for the budget; the parts, and `reconstruct`, are the rows of its Table 3."""

    parts: str = "csb+ssc"  # csb: balance at the mean salience over timesteps; none: neither
    ranges: str = "mse"  # of weights and static activations: mse (percentile search) | minmax
    floor: float = 1e-8  # on both saliences: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts not in PARTS:
            raise ValueError(f"ptq4dit: parts must be {', '.join(PARTS[:-1])} or {PARTS[-1]}, got {self.parts!r}")
        if self.ranges not in ("mse", "minmax"):
            raise ValueError(f"ptq4dit: ranges must be mse or minmax, got {self.ranges!r}")


FORMS = {
    PUBLISHED: Form(
        {
            "iterations": 20_000,
            "learning_rate": 1e-3,
            "batch_size": 32,
            "batch_tokens": ALL_TOKENS,
            "error_over": "tokens",
        },
        ASYMMETRIC_WEIGHTS | STATIC_ACTIVATIONS | {"calibration.n": 32},
    )
}


def check_bits(bits: Bits) -> None:
    needs_integers("ptq4dit", bits.weight, bits.act)


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    if params.parts != "none":
        stats = channel_stats(target, calibration)
        for site in balanced_sites(target):
            act_salience_SC = of_site(stats, site).absmax_SC
            state[f"{site.name}/scale"] = balance(act_salience_SC, weight_absmax(target, site), params)
    transforms, folded = placement(target, state)
    state |= static_ranges(target, bits, calibration, transforms, folded, ranges=params.ranges)
    return state | reconstruct(target, apply(target, state, bits, params), calibration, params)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    transforms, folded = placement(target, state)
    weights = learned_weights(target, state, bits.weight)
    return nearest(target, bits, state, transforms, folded, weights=weights, weight_ranges=params.ranges)


def balanced_sites(target: Target) -> list[Site]:
    return [site for site in target.linear_sites() if site.foldable]


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    scales = {site.name: state.get(f"{site.name}/scale") for site in balanced_sites(target)}
    return place(target, {name: Transform(scale_C=scale_C) for name, scale_C in scales.items()})


def balance(act_salience_SC: Tensor, weight_salience_C: Tensor, params: Params) -> Tensor:
    """(B^X)⁻¹ = √(s_ρ(X) / s(W)), one factor per input channel (Eq. 5–6 with s_ρ of Eq. 10)."""
    if params.parts == "csb+ssc":
        weights_S = timestep_weights(spearman(act_salience_SC, weight_salience_C))
    else:
        weights_S = torch.full((len(act_salience_SC),), 1.0 / len(act_salience_SC))
    salience_C = (weights_S[:, None] * act_salience_SC).sum(0)
    return (salience_C.clamp(min=params.floor) / weight_salience_C.clamp(min=params.floor)).sqrt()


def timestep_weights(spearman_S: Tensor) -> Tensor:
    """η_t, Eq. 11."""
    return torch.softmax(-spearman_S, dim=0)


def spearman(rows_SC: Tensor, reference_C: Tensor) -> Tensor:
    """Spearman's rank correlation of each row with the reference; 0 where either has no variation."""
    from scipy.stats import rankdata  # here, since whoever lists methods need not wait for it

    ranks_SC = torch.as_tensor(rankdata(rows_SC.numpy(), axis=1))
    ranks_C = torch.as_tensor(rankdata(reference_C.numpy()))
    centred_SC, centred_C = ranks_SC - ranks_SC.mean(1, keepdim=True), ranks_C - ranks_C.mean()
    norm_S = centred_SC.norm(dim=1) * centred_C.norm()
    return torch.where(norm_S > 0, (centred_SC @ centred_C) / norm_S.clamp(min=1e-12), torch.zeros(())).float()
