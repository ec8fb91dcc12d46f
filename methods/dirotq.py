"""DiRotQ (Sharify et al. 2026, arXiv:2605.16732): inputs in their principal axes; the leading ones in 16 bits, the rest rotated and rounded.

    E[x xᵀ] = U diag(λ) Uᵀ,   V = [U_low R, U_high],   R random orthogonal
    Y = X Wᵀ = Q(X U_low R) Q(W U_low R)ᵀ + (X U_high)(W U_high)ᵀ

    paper / release   here              meaning
    U_high            high(width)       the axes of the largest λ: an eighth of the width (`share`), up to a whole number of groups
    U_low R           basis             rotated with V online, W offline; V is a dense matrix of the layer's width
    high_bits         LowRank, bfloat16 what the leading axes carry, as a branch: 16 bits on both sides
    groups            bits              64 channels on both sides, activations asymmetric (form=published)
    GPTQ              weights=gptq      on the second moment of X U_low R, damped as much as the whole one would be

Departs from the paper: at full width before an attention's output layer (there: head by head). The first columns of the branch's
lower factor are zeros and the rest an identity, which the release does not store and is counted here; V is counted at every layer that
reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.channel_statistics import inputs_observed, run_calibration
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.blockwise import Hessian, round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.models.calls import float_dtype
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.lowrank import FACTOR_DTYPE
from ditbench.harness.quant.quantizers import QuantizedWeight, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, LowRank, ModelRecipe
from ditbench.harness.quant.rotations import BlockRotation
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.quant.uneven import LeadingQuant

GROUP = 64  # channels in the release's groups: U_high is a whole number of them where the layer is as wide


@dataclass(frozen=True)
class Params:
    """Defaults are the release's."""

    share: float = 0.125  # of the axes, in 16 bits
    residual: str = "random"  # what the low axes are rotated with: random | identity
    weights: str = "gptq"  # gptq | nearest
    damp: float = 0.01  # of GPTQ, and of the second moment whose axes are taken
    seed: int = 0
    max_bytes: int = MAX_BYTES  # of second moments, and of GPTQ's hidden states, at a time

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"dirotq: share must be in [0, 1), got {self.share}")
        for name, known in (("residual", ("random", "identity")), ("weights", ("gptq", "nearest"))):
            if getattr(self, name) not in known:
                raise ValueError(f"dirotq: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.damp < 0:
            raise ValueError(f"dirotq: damp must be at least 0, got {self.damp}")


OF_64 = {"granularity": "per_block", "group_size": GROUP}
FORMS = {
    PUBLISHED: Form(
        settings={f"bits.{side}.{name}": value for side in ("weight", "act") for name, value in OF_64.items()}
        | {"bits.act.symmetric": False, "calibration.n": 128}
    )
}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    if bits.weight is None and bits.act is None:
        return {}
    state = {f"{site}/basis": basis for site, basis in bases(target, calibration, params).items()}
    rotated = rotations(target, state)
    if bits.act is not None and not bits.act.dynamic:
        state |= static_ranges(target, bits, calibration, rotated) | low_ranges(target, calibration, state, params)
    branch = {name: branch_of(target, name, rotated, params) for name in target.layers if name in rotated}
    state |= {f"{name}/up": each.up_Or for name, each in branch.items()}
    if bits.weight is None:
        return state
    spec = bits.weight

    def round_weight(name: str, weight_OC: Tensor, hessian_CC: Tensor) -> QuantizedWeight:
        spec.check_width(name, weight_OC.shape[1])
        low = low_channels(weight_OC.shape[1], params) if name in branch else weight_OC.shape[1]
        return rounded_low(weight_OC, hessian_CC, low, params, spec)

    if params.weights == "gptq":
        weights = round_blockwise(
            target, calibration, round_weight, rotated, low_rank=branch, max_bytes=params.max_bytes
        )
    else:
        weights = {}
        for name in target.layers:
            weight_OC = effective_linear(target, name, rotated, frozenset()).weight_OC
            spec.check_width(name, weight_OC.shape[1])
            weights[name] = quantize_weight(without_high(weight_OC, name in branch, params), spec)
    for name, weight in weights.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    rotated = rotations(target, state)
    weights = {n: weight_from_state(n, state, bits.weight) for n in target.layers if f"{n}/codes" in state}
    recipe = nearest(target, bits, state, rotated, weights=weights)

    def completed(name: str, layer: LayerRecipe) -> LayerRecipe:
        up_Or = state.get(f"{name}/up")
        if up_Or is None:
            return layer
        width = target.module(name).in_features
        act = layer.act
        if act is not None:
            act = LeadingQuant(act.spec, act.scale, act.zero_point, channels=low_channels(width, params))
        return replace(layer, act=act, low_rank=LowRank(selector(width, params), up_Or))

    return replace(recipe, layers={name: completed(name, layer) for name, layer in recipe.layers.items()})


def high(width: int, params: Params) -> int:
    """How many axes are kept in 16 bits: the share, up to a whole number of groups of 64 in layers of at least 8 groups."""
    wanted = round(params.share * width)
    return math.ceil(wanted / GROUP) * GROUP if width >= 8 * GROUP else wanted


def low_channels(width: int, params: Params) -> int:
    low = width - high(width, params)
    if low < 1:
        raise UserError(
            f"dirotq: share={params.share} leaves none of {width} axes to round; set method.share=0.5 or less"
        )
    return low


def selector(width: int, params: Params) -> Tensor:
    """The branch's lower factor: the last axes of x'."""
    return torch.eye(width, dtype=FACTOR_DTYPE)[low_channels(width, params) :].clone()


def rotations(target: Target, state: dict[str, Tensor]) -> dict[str, Transform]:
    """The basis of each site, shared by the target layers that read it; layers in float are left alone."""
    transforms = {}
    for site in target.linear_sites():
        if f"{site.name}/basis" not in state:
            continue
        basis_CC = state[f"{site.name}/basis"]
        shared = Transform(rotations=(BlockRotation(len(basis_CC), basis_CC),))
        transforms |= {name: shared for name in site.consumers if name in target.layers}
    return transforms


def bases(target: Target, calibration: Calibration, params: Params) -> dict[str, Tensor]:
    """{site: V, float64 (C, C)}: the principal axes of what its layers read, the largest last."""
    return {
        name: basis(moment_CC.to(target.device), params)
        for sites in in_passes(target, params.max_bytes)
        for name, moment_CC in moments(target, calibration, sites).items()
    }


def moments(target: Target, calibration: Calibration, sites: list[Site]) -> dict[str, Tensor]:
    """{site: E[x xᵀ]} over all that its layers read, float32 (C, C)."""
    seen = {site.name: Hessian() for site in sites}
    readers = {name: site.name for site in sites for name in site.first_readers}
    model = float_copy(target, dtype=float_dtype(target.transformer), device=calibration.device)
    with inputs_observed(model, readers, lambda site, step, x: seen[site].see(x)) as set_step:
        run_calibration(model, calibration, set_step, "principal axes")
    return {name: each.mean_CC(name) for name, each in seen.items()}


def in_passes(target: Target, max_bytes: int) -> Iterator[list[Site]]:
    """Sites whose second moments fit into so many bytes together, at least one at a time."""
    taken: list[Site] = []
    size = 0
    for site in target.linear_sites():
        own = 4 * target.module(site.consumers[0]).in_features ** 2  # type: ignore[operator]
        if taken and size + own > max_bytes:
            yield taken
            taken, size = [], 0
        taken.append(site)
        size += own
    if taken:
        yield taken


def basis(moment_CC: Tensor, params: Params) -> Tensor:
    """V = [U_low R, U_high], float64 on the CPU."""
    moment_CC = moment_CC.double()
    width = len(moment_CC)
    damped_CC = moment_CC.clone()
    damped_CC.diagonal().add_(params.damp * moment_CC.diagonal().mean())
    axes_CC = torch.linalg.eigh(damped_CC).eigenvectors  # by rising eigenvalue
    low = low_channels(width, params)
    if params.residual == "random":
        turned = axes_CC[:, :low] @ random_rotation(low, params.seed).to(axes_CC.device)
        axes_CC = torch.cat([turned, axes_CC[:, low:]], 1)
    return axes_CC.cpu().contiguous()


@cache
def random_rotation(size: int, seed: int) -> Tensor:
    """R, the same for all inputs of a width; made on the CPU: a factorization's signs are its library's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def branch_of(target: Target, name: str, rotated: dict[str, Transform], params: Params) -> LowRank:
    weight_OC = effective_linear(target, name, rotated, frozenset()).weight_OC
    up_Or = weight_OC[:, low_channels(weight_OC.shape[1], params) :].to(FACTOR_DTYPE).cpu()
    return LowRank(selector(weight_OC.shape[1], params), up_Or.contiguous())


def without_high(weight_OC: Tensor, has_branch: bool, params: Params) -> Tensor:
    """Columns that the branch has are zero."""
    weight_OC = weight_OC.clone()
    if has_branch:
        weight_OC[:, low_channels(weight_OC.shape[1], params) :] = 0
    return weight_OC


def rounded_low(weight_OC: Tensor, hessian_CC: Tensor, low: int, params: Params, spec: QuantSpec) -> QuantizedWeight:
    """GPTQ of the first columns; the others are zero, and no error is moved there."""
    weight_OC, hessian_CC = weight_OC.clone(), hessian_CC.clone()
    own = hessian_CC.diagonal()[:low].mean().clamp(min=1e-12)
    whole = hessian_CC.diagonal().mean().clamp(min=1e-12)
    weight_OC[:, low:] = 0
    hessian_CC[low:, :] = 0
    hessian_CC[:, low:] = 0
    hessian_CC.diagonal()[low:] = own
    # as much is added to the diagonal as to that of all axes: what is left of it is small in these
    return gptq(weight_OC, hessian_CC, spec, damp=params.damp * max(1.0, float(whole / own)))


@torch.no_grad()
def low_ranges(target: Target, calibration: Calibration, state: dict[str, Tensor], params: Params) -> dict[str, Tensor]:
    """Range ends of the axes that are rounded, over all steps, for static activations: {layer/act_low, layer/act_high: (1,)}."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    low_axes = {}
    for site in target.linear_sites():
        basis_CC = state[f"{site.name}/basis"]
        axes = basis_CC[:, : low_channels(len(basis_CC), params)].float().to(calibration.device)
        low_axes |= dict.fromkeys(site.first_readers, axes)

    def observe(name: str, step: int, x: Tensor) -> None:
        turned = x.detach().float() @ low_axes[name]
        low, high_end = ends.get(name, (turned.amin(), turned.amax()))
        ends[name] = torch.minimum(low, turned.amin()), torch.maximum(high_end, turned.amax())

    model = float_copy(target, dtype=float_dtype(target.transformer), device=calibration.device)
    with inputs_observed(model, {name: name for name in low_axes}, observe) as set_step:
        run_calibration(model, calibration, set_step, "ranges")
    found: dict[str, Tensor] = {}
    for site in target.linear_sites():
        for group in site.groups:
            low, high_end = (end.cpu()[None] for end in ends[group[0]])
            found |= {f"{name}/act_low": low.clone() for name in group}
            found |= {f"{name}/act_high": high_end.clone() for name in group}
    return found
