"""SVDQuant (Li et al. 2024, arXiv:2411.05007): a 16-bit low-rank branch absorbs outliers, 4 bits keep the residual.

    X̂ = X diag(λ)⁻¹,  Ŵ = W diag(λ)                       outliers move from X into W
    Ŵ ≈ b a,  R = Ŵ − b a                                  and from W into a branch of rank r
    Y = X Wᵀ ≈ (X̂ aᵀ) bᵀ + Q(X̂) Q(R)ᵀ

    paper        here               meaning
    λ            scale_C            max|X|^α / max|W|^β, one per layer input (q, k and v share it)
    α, β         candidates         (0, 0), (i/n, 0), (i/n, 1 − i/n) for 0 < i < n; n = num_grids: 39 of them for 20
    L1, L2       down_rC, up_Or     a = V_rᵀ, b = U_r S_r; q, k, v share a, from the SVD of their stacked weights
    r            rank               32, at most half the smaller side of the (stacked) weight: tiny layers get less
    R            residual_MC        from a and b as rounded to 16 bits (`harness.quant.lowrank`)

λ is the candidate with the least output error ‖X Wᵀ − Y‖² on a bounded sample of the calibration, branch and rounding in
place. With iterations > 1 branch and rounded residual are fitted in turn while that error falls.

Of integers below 8 bits the format is the method's own, as in the paper: a scale per group of 64 input channels (or the largest
divisor of C below; or the group_size of `bits`, if that is per_group) of each output channel and of each token, symmetric,
activations dynamic. Inputs behind a GELU, which never fall below −0.17004, are shifted up by 0.171875 and take unsigned
codes; the bias gives the shift back. At 8 bits granularity and symmetry are those of `bits`, and nothing is shifted. Formats in
blocks (bits=nvfp4, as nunchaku has it, mxfp4, int4_g64, …) are taken as they are, residual and activations both; of them only
integers are shifted.

Where an attention over image and text has an output layer for each, both share λ (their rows of V do), and each has its own a.
The adaLN linears, embedders and output layers have neither λ nor branch (`plain`): where the protocol quantizes them, they
are rounded only, in the same format. λ runs online, as the paper's kernel divides there; fold=true moves it into the rows
of the producer where there is one. Each of q, k, v stores its copy of a, and is counted with it.

Departs from the paper: 5 grids (20; 10 in its fast setting) and one iteration (up to 100) are the defaults, for a CPU's
budget: an SVD per candidate and layer input is most of the time; factors are bfloat16; no search of the weight ranges (80 grids); the same rank at every width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.activated import GELU, activation_readers
from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.channel_statistics import (
    ChannelStats,
    channel_stats,
    inputs_observed,
    of_site,
    run_calibration,
)
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.blockwise import round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.lowrank import Split, branches, capped_rank, output_error, refine, residual, split
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, LowRank, ModelRecipe, to_device
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.spec import INT, Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Site, Target, weight_matrix
from ditbench.harness.quant.transforms import Transform

DATA_FREE = "data_free"  # the form that weights alone decide: branch and residual, λ = 1
OWN_FORMAT_BELOW = 8  # bits
GELU_DEPTH = 0.17005  # no GELU falls below minus that
GOLDEN = 0.6180339887498949  # steps through the unit interval without ever repeating


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's but for num_grids and iterations."""

    rank: int = 32
    smooth: str = "grid"  # grid: search λ | half: α = β = 1/2 | off
    num_grids: int = 5  # 20 in the paper, 10 in its fast setting
    iterations: int = 1  # 100 in the paper, up to the first increase
    residual: str = "nearest"  # nearest | gptq
    group_size: int = 64
    gelu_shift: float = 0.171875  # 0: signed codes behind a GELU as well
    plain: str = r"norm|embed|proj_out"  # layers that are only rounded
    fold: bool = False  # λ into the producer's rows where there is one
    sample_rows: int = 512  # tokens of each layer input that errors are measured on
    damp: float = 0.01  # of GPTQ
    max_bytes: int = MAX_BYTES  # of the hidden states that GPTQ keeps at a time: so many rows are used
    floor: float = 1e-5  # on both ranges: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        for name, least in (("rank", 0), ("num_grids", 1), ("iterations", 1), ("group_size", 1), ("sample_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"svdquant: {name} must be at least {least}, got {getattr(self, name)}")
        for name, known in (("smooth", ("grid", "half", "off")), ("residual", ("nearest", "gptq"))):
            if getattr(self, name) not in known:
                raise ValueError(f"svdquant: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.gelu_shift != 0 and self.gelu_shift < GELU_DEPTH:
            raise ValueError(f"svdquant: gelu_shift must be 0, or at least {GELU_DEPTH}, got {self.gelu_shift}")


FORMS = {
    PUBLISHED: Form({"num_grids": 20, "iterations": 100}, {"calibration.n": 128}),
    DATA_FREE: Form({"smooth": "off", "gelu_shift": 0.0}, {"calibration.n": 0}),
}


def check_bits(bits: Bits) -> None:
    if has_own_format(bits.act) and not bits.act.dynamic:
        raise UserError(
            f"svdquant: activations of {bits.act.bits} bits have a scale per group of each token, which cannot be static; "
            "set bits.act.dynamic=true, or 8 bits"
        )


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    check_bits(bits)
    if bits.weight is None and bits.act is None:
        return {}
    for name in target.layers:
        for spec in (bits.weight, bits.act):
            if spec is not None:
                spec.check_width(name, weight_matrix(target.module(name)).shape[1])
    samples = site_samples(target, calibration, params)
    state = shifts(target, calibration, bits, params)
    state |= fit_smoothing(target, calibration, samples, state, bits, params)
    transforms, folded = placement(target, state, bits, params)
    state |= static_ranges(target, bits, calibration, transforms, folded)
    if bits.weight is None:
        return state

    low_rank: dict[str, LowRank] = {}
    for site in branch_sites(target, params):
        for names in quantized_groups(target, site):
            weights = [effective_linear(target, name, transforms, folded).weight_OC for name in names]
            transform, sample_TC = to_device((transforms.get(names[0]), samples.get(names[0])), target.device)
            parts = fit_branch(weights, transform, sample_TC, bits, params)
            if parts.rank:
                low_rank |= branches(names, parts, [len(weight_OC) for weight_OC in weights])
                state |= {down_key(site, names[0]): low_rank[names[0]].down_rC}
                state |= {f"{name}/up": low_rank[name].up_Or for name in names}

    def round_gptq(name: str, residual_OC: Tensor, hessian_CC: Tensor) -> QuantizedWeight:
        return gptq(residual_OC, hessian_CC, weight_spec(bits, residual_OC.shape[1], params), damp=params.damp)

    def round_nearest(name: str) -> QuantizedWeight:
        weight_OC = effective_linear(target, name, transforms, folded).weight_OC
        spec = weight_spec(bits, weight_OC.shape[1], params)
        return to_device(quantize_weight(residual(weight_OC, low_rank.get(name)), spec), "cpu")

    if params.residual == "gptq":
        rounded = round_blockwise(
            target, calibration, round_gptq, transforms, folded, low_rank=low_rank, max_bytes=params.max_bytes
        )
    else:
        rounded = {name: round_nearest(name) for name in target.layers}
    for name, weight in rounded.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    transforms, folded = placement(target, state, bits, params)
    weights, acts = {}, {}
    for name in target.layers:
        width = weight_matrix(target.module(name)).shape[1]
        if bits.weight is not None:
            weights[name] = weight_from_state(name, state, weight_spec(bits, width, params))
        if is_of_few_bits(bits.act):
            acts[name] = ActQuant(act_spec(bits, width, is_shifted(target.site_of(name), state), params))
    recipe = nearest(target, bits, state, transforms, folded, weights=weights)

    def completed(name: str, layer: LayerRecipe) -> LayerRecipe:
        up_Or = state.get(f"{name}/up")
        branch = None if up_Or is None else LowRank(state[down_key(target.site_of(name), name)], up_Or)
        return replace(layer, act=acts.get(name, layer.act), low_rank=branch)

    return replace(recipe, layers={name: completed(name, layer) for name, layer in recipe.layers.items()})


def placement(
    target: Target, state: dict[str, Tensor], bits: Bits, params: Params
) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in branch_sites(target, params):
        width = weight_matrix(target.module(site.consumers[0])).shape[1]
        by_site[site.name] = transform_of(width, state.get(f"{site.name}/scale"), state.get(f"{site.name}/shift"))
    return place(target, by_site, fold=params.fold)


def transform_of(width: int, scale_C: Tensor | None, shift: Tensor | None) -> Transform:
    """x' = (x − shift) / λ; what is missing is left out."""
    if shift is None:
        return Transform(scale_C=scale_C)
    return Transform(StepTable.constant(shift.cpu().expand(width).clone()), scale_C)


def branch_sites(target: Target, params: Params) -> list[Site]:
    """The inputs that get λ and a branch."""
    plain = re.compile(params.plain)
    return [
        site
        for site in target.linear_sites()
        if not params.plain or not any(plain.search(name) for name in site.consumers)
    ]


def quantized_groups(target: Target, site: Site) -> list[tuple[str, ...]]:
    """The layers to quantize by the tensor that they read."""
    groups = [tuple(name for name in group if name in target.layers) for group in site.groups]
    return [group for group in groups if group]


def down_key(site: Site, layer: str) -> str:
    """Where the state has a of the branch that this layer shares with those that read the same tensor."""
    return f"{site.name if len(site.groups) == 1 else site.group_of(layer)[0]}/down"


def shifts(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    """{site/shift: −gelu_shift} for every input that is a GELU's, where codes are few."""
    if params.gelu_shift == 0 or not is_of_few_bits(bits.act):
        return {}
    behind = activation_readers(target, calibration)
    return {
        f"{site.name}/shift": torch.tensor(-params.gelu_shift)
        for site in branch_sites(target, params)
        if all(behind.get(name) == GELU for name in site.consumers)
    }


def is_shifted(site: Site, state: dict[str, Tensor]) -> bool:
    return f"{site.name}/shift" in state


def is_of_few_bits(spec: QuantSpec | None) -> bool:
    return spec is not None and spec.bits < OWN_FORMAT_BELOW and spec.number == INT


def has_own_format(spec: QuantSpec | None) -> bool:
    return spec is not None and is_of_few_bits(spec) and not spec.in_blocks


def weight_spec(bits: Bits, width: int, params: Params) -> QuantSpec:
    assert bits.weight is not None
    if not has_own_format(bits.weight):
        return bits.weight
    return QuantSpec(bits.weight.bits, "per_group", group_size=group_size(bits.weight, width, params))


def act_spec(bits: Bits, width: int, shifted: bool, params: Params) -> QuantSpec:
    """Unsigned where the input was shifted: it is ≥ 0, so that the zero_point of an asymmetric range is 0."""
    assert bits.act is not None
    if bits.act.in_blocks:
        return replace(bits.act, symmetric=not shifted)
    size = group_size(bits.act, width, params)
    return QuantSpec(bits.act.bits, "per_group", symmetric=not shifted, dynamic=True, group_size=size)


def group_size(spec: QuantSpec, width: int, params: Params) -> int:
    """That of bits if it has one (`fit` refuses one that does not divide C), or the largest divisor of C in reach."""
    if spec.group_size is not None:
        return spec.group_size
    return next(size for size in range(min(params.group_size, width), 0, -1) if width % size == 0)


def fit_smoothing(
    target: Target,
    calibration: Calibration,
    samples: dict[str, Tensor],
    shifted: dict[str, Tensor],
    bits: Bits,
    params: Params,
) -> dict[str, Tensor]:
    """{site/scale: λ} for every input that gets one; empty if smoothing is off. shifted: what `shifts` gave."""
    if params.smooth == "off":
        return {}  # nobody asks for statistics
    stats = channel_stats(target, calibration)
    state = {}
    for site in branch_sites(target, params):
        shift, of_this = shifted.get(f"{site.name}/shift"), to_device(of_site(stats, site), target.device)
        state[f"{site.name}/scale"] = smoothing(target, site, of_this, samples, shift, bits, params).cpu()
    return state


def smoothing(
    target: Target,
    site: Site,
    stats: ChannelStats,
    samples: dict[str, Tensor],
    shift: Tensor | None,
    bits: Bits,
    params: Params,
) -> Tensor:
    """λ of one layer input, from the weights as they are before any fold into their rows."""
    groups = quantized_groups(target, site)
    weights = [[target.weight(name).double() for name in group] for group in groups]
    centre = 0.0 if shift is None else float(shift)
    act_absmax_C = torch.maximum(stats.max_SC - centre, centre - stats.min_SC).amax(0)
    weight_absmax_C = torch.cat([weight_OC for group in weights for weight_OC in group]).abs().amax(0).float()
    if params.smooth == "half":
        return smoothing_scale(act_absmax_C, weight_absmax_C, 0.5, 0.5, params.floor)
    seen = [samples[group[0]].to(target.device) for group in groups]
    best_C, least = torch.ones_like(act_absmax_C), torch.inf
    for alpha, beta in candidates(params.num_grids):
        scale_C = smoothing_scale(act_absmax_C, weight_absmax_C, alpha, beta, params.floor)
        transform = transform_of(len(scale_C), scale_C, shift)
        error = sum(
            candidate_error(of_group, transform, sample_TC, bits, params)
            for of_group, sample_TC in zip(weights, seen, strict=True)
        )
        if error < least:
            best_C, least = scale_C, error
    return best_C


def candidates(num_grids: int) -> list[tuple[float, float]]:
    """(α, β): no smoothing, by activations alone, by both."""
    steps = [i / num_grids for i in range(1, num_grids)]
    return [(0.0, 0.0), *((alpha, 0.0) for alpha in steps), *((alpha, 1 - alpha) for alpha in steps)]


def smoothing_scale(act_absmax_C: Tensor, weight_absmax_C: Tensor, alpha: float, beta: float, floor: float) -> Tensor:
    """max|X|^α / max|W|^β, one factor per input channel."""
    return act_absmax_C.clamp(min=floor) ** alpha / weight_absmax_C.clamp(min=floor) ** beta


def candidate_error(
    weights: list[Tensor], transform: Transform, sample_TC: Tensor, bits: Bits, params: Params
) -> float:
    """‖X Wᵀ − Y‖² on the sample, over all layers that read the tensor."""
    transform = to_device(transform, sample_TC.device)
    weight_MC, x_TC = transform.of_weight(torch.cat(weights)), transform(sample_TC.double())
    rounded_x_TC = rounded_act(x_TC, transform.shift is not None, bits, params)
    if bits.weight is None:
        return output_error(x_TC, rounded_x_TC, weight_MC, weight_MC)
    residual_MC = split(weight_MC, capped_rank(weight_MC, params.rank)).residual_MC
    rounded_MC = rounded_rows(residual_MC, [len(weight_OC) for weight_OC in weights], bits, params)
    return output_error(x_TC, rounded_x_TC, residual_MC, rounded_MC)


def fit_branch(
    weights: list[Tensor], transform: Transform | None, sample_TC: Tensor | None, bits: Bits, params: Params
) -> Split:
    """The branch that the layers of one tensor share; weights are the transformed ones."""
    weight_MC, rows = torch.cat(weights), [len(weight_OC) for weight_OC in weights]
    rank = capped_rank(weight_MC, params.rank)
    if params.iterations == 1 or rank == 0:
        return split(weight_MC, rank)
    assert sample_TC is not None
    x_TC = sample_TC.double() if transform is None else transform(sample_TC.double())
    rounded_x_TC = rounded_act(x_TC, transform is not None and transform.shift is not None, bits, params)
    best, _ = refine(
        weight_MC,
        rank,
        lambda residual_MC: rounded_rows(residual_MC, rows, bits, params),
        lambda residual_MC, rounded_MC: output_error(x_TC, rounded_x_TC, residual_MC, rounded_MC),
        iterations=params.iterations,
    )
    return best


def rounded_rows(weight_MC: Tensor, rows: list[int], bits: Bits, params: Params) -> Tensor:
    """Each layer's rows rounded to nearest, float64."""
    spec = weight_spec(bits, weight_MC.shape[1], params)
    return torch.cat([quantize_weight(part_OC, spec).dequantize() for part_OC in weight_MC.split(rows)]).double()


def rounded_act(x_TC: Tensor, shifted: bool, bits: Bits, params: Params) -> Tensor:
    """The sample as the layer will round it; a static range is that of the sample."""
    if bits.act is None:
        return x_TC
    spec = replace(bits.act, dynamic=True)
    if is_of_few_bits(bits.act):
        spec = act_spec(bits, x_TC.shape[1], shifted, params)
    return fake_quantize_activation(x_TC, ActQuant(spec))


def site_samples(target: Target, calibration: Calibration, params: Params) -> dict[str, Tensor]:
    """{layer: x_TC} with about sample_rows tokens (at least one per call), spread over steps, samples and tokens.

    Layers that read one tensor share a sample. Empty if no error has to be measured.
    """
    if params.smooth != "grid" and params.iterations == 1:
        return {}
    wanted = max(1, params.sample_rows // calibration.num_batches())
    kept: dict[str, list[Tensor]] = {}

    def observe(name: str, step: int, x: Tensor) -> None:
        x_TC = x.detach().float().flatten(0, -2)
        count, calls = min(wanted, len(x_TC)), kept.setdefault(name, [])
        offset = len(calls) * GOLDEN % 1  # a fixed grid would see the same tokens at every step
        calls.append(x_TC[((torch.arange(count) + offset) * (len(x_TC) / count)).long()].clone())

    model = float_copy(target, dtype=torch.float32, device=target.device)
    groups = [group for site in branch_sites(target, params) for group in site.groups]
    with inputs_observed(model, {group[0]: group[0] for group in groups}, observe) as set_step:
        run_calibration(model, calibration, set_step, "sample")
    sampled = {name: torch.cat(calls).cpu() for name, calls in kept.items()}
    return {name: sampled[group[0]] for group in groups for name in group}
