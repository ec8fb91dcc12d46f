"""CLQ (Liu et al. 2025, arXiv:2509.24416): cross-block calibration, orthogonal smoothing and cross-layer clipping for DiT.

CBC. Block k is calibrated in float on what the rounded blocks before it give; the sampler is not run again:

    h_k = Q(block_k)(h_{k−1});   X and Y of block k's layers are those of block_k(h_{k−1})

OBS. A permutation S gathers channels of similar magnitude, a block-diagonal Hadamard matrix H spreads each half:

    Y = X Wᵀ = (X G)(W G)ᵀ,   G = S H,   S: the D/nb channels of largest o_j first,   H = diag(Had(D/nb), …)

CLPS. Range ends (l, r) of a quantizer are judged at a later layer T, where its error shows most:

    ε_c(L) = mean|Y_L − Ŷ_L(c·(min, max))| / mean|Y_L|  for c in Δ;   T = argmax_L Var_c ε_c(L), at most 3 blocks behind
    l*, r* = argmin over l, r of ‖Y_T − Ŷ_T(l, r)‖²,   l = (1 − i/K) min,   r = (1 − j/K) max

    paper       here             meaning
    S           permutation      group (paper) | deal (ranks dealt out to the blocks in turn) | none | random
    o_j         score            absmax | rms | p999 of |X_j| over samples and tokens (p999: of each call, then the largest)
    (signs)     signs            H = diag(±1) · Had, the signs drawn once (random), or Had alone (none)
    nb          blocks           number of Hadamard blocks; see `hadamard_blocks` where D/nb has no Hadamard matrix
    Δ           probe            shares of the range that are tried to find T
    T           choose           variance (paper) | peak (largest mean error)
    K           grid, lowest     candidates 1 − i/K, down to `lowest`
    (3 blocks)  reach            how far behind the quantizer's block T may be
    β, γ        weight_ratios    l = β · min, r = γ · max of each row; one pair per layer

Certain, from the paper's figures and its public reviews: preceding blocks rounded and the calibrated one in float; G = S H
with similar magnitudes together and two dense halves in the original order; a target layer downstream, of the largest
variance, within three blocks; the squared error there. The text and code are not public in full; reconstructed are: the
outlier score, the signs of H (no source says any), Δ, the grid (that of 2DQuant by the same author: diagonal first, then
around the best, here as long as the best moves), the prefix depth (`cbc_depth`: all blocks before, or 1, the previous block
on otherwise float input), ranges as ratios of each row's ends, one quantizer rounded at a time during the search, all steps
pooled. Quantizers of one block do not see one another.

Departs from the paper: K is 20 and candidates stop at 0.4 (2DQuant: 100 and 0), on 4 samples × 4 steps and at most 1,024
tokens, for CPUs; weights are symmetric, as `bits` has it, and H has random signs, as all other rotations here. form=published
has 2DQuant's grid, the two range ends of asymmetric weights, no signs and one scale per token. ε is divided by mean|Y_L|, or
the target would follow the scale of the outputs. With permutation=group, activations that are dynamic per token get one scale
per token and Hadamard block (`act_scale` auto), or the outliers' half would set the scale of both. Dynamic activations have no
fixed ends: one clip ratio per layer input is searched. Where nothing follows, the target is the layer's own output. `target`
fp_network judges against the float network's own response, which lets a block make up for errors before it. Linears outside
the blocks, and attention operands, are rounded plainly. With dynamic activations CBC alone calibrates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.calibration.block_stream import MAX_BYTES, BlockInput, BlockStream
from ditbench.harness.calibration.channel_statistics import ChannelMagnitude
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, Form
from ditbench.harness.fitting.rounding import act_quant, nearest, static_ranges
from ditbench.harness.fitting.trial_layers import TrialLayer, float_model, input_ranges, trial_layers
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.hadamard import hadamard_blocks
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target, weight_matrix
from ditbench.harness.quant.transforms import Hadamard, Permutation, Rotation, Transform, random_signs

PARTS = ("cbc", "obs", "clps")
CHOICES = {
    "cbc_depth": ("all", "1"),
    "target": ("fp_block", "fp_network"),
    "permutation": ("group", "deal", "none", "random"),
    "signs": ("random", "none"),
    "score": ("absmax", "rms", "p999"),
    "act_scale": ("auto", "token", "token_block"),
    "choose": ("variance", "peak"),
}


@dataclass(frozen=True)
class Params:
    """parts: which of the three are on, joined by +, or none: the rows of the ablation are values of one parameter."""

    parts: str = "cbc+obs+clps"
    cbc_depth: str | int = "all"
    target: str = "fp_block"
    permutation: str = "group"
    signs: str = "random"  # of the rotations: random | none
    score: str = "absmax"
    blocks: int = 2
    act_scale: str = "auto"
    probe: tuple[float, ...] = (0.4, 0.55, 0.7, 0.85, 1.0)
    choose: str = "variance"
    reach: int = 3
    grid: int = 20
    lowest: float = 0.4
    local: int = 4  # how far around the best pair (i, j) so far the pairs (i + a, j + b) are searched
    search_samples: int = 4
    search_steps: int = 4
    search_tokens: int = 1024  # in all of them: fewer samples of a model with longer sequences, but one per step
    seed: int = 0  # of signs=random and permutation=random
    max_bytes: int = MAX_BYTES  # of the hidden states kept at a time: so many rows are used

    def __post_init__(self) -> None:
        object.__setattr__(self, "cbc_depth", str(self.cbc_depth))  # Hydra reads 1 as a number
        object.__setattr__(self, "probe", tuple(self.probe))
        named = [] if self.parts == "none" else self.parts.split("+")
        if set(named) - set(PARTS) or len(set(named)) != len(named):
            raise ValueError(f"clq: parts are none, or some of {', '.join(PARTS)} joined by +, got {self.parts!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"clq: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        least = dict.fromkeys(("blocks", "grid", "search_samples", "search_steps", "search_tokens"), 1)
        for name, bound in (least | {"reach": 0, "local": 0}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"clq: {name} must be at least {bound}, got {getattr(self, name)}")
        if not self.probe or not all(0 < c <= 1 for c in (*self.probe, self.lowest or 1)):
            raise ValueError(f"clq: probe and lowest are shares in (0, 1], got {self.probe} and {self.lowest}")

    def has(self, part: str) -> bool:
        return part in self.parts.split("+")


ALL_OF_THE_GRID = {"grid": 100, "lowest": 0.0, "local": 5}  # 2DQuant's
FORMS = {PUBLISHED: Form({"signs": "none", "act_scale": "token"} | ALL_OF_THE_GRID, ASYMMETRIC_WEIGHTS)}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    """Block by block: OBS and CLPS on the data that CBC says, then the block is rounded for those behind it."""
    state: dict[str, Tensor] = {}
    static = bits.act is not None and not bits.act.dynamic
    if params.has("obs") or params.has("clps") or static:
        for name in target.layers:
            for spec in (bits.weight, bits.act):
                if spec is not None:
                    spec.check_width(name, weight_matrix(target.module(name)).shape[1])
        walk(target, calibration, bits, params, state)
    return static_ranges(target, bits, calibration, transforms(target, state, params)) | state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    rotated, weights = transforms(target, state, params), {}
    if bits.weight is not None:
        for name in target.layers:
            weight_OC = effective_linear(target, name, rotated, frozenset()).weight_OC
            rounded = quantize_weight(weight_OC, bits.weight, ratios=weight_ratios(state, name))
            weights[name] = to_device(rounded, "cpu")  # all layers at once only there
    recipe = nearest(target, bits, state, rotated, weights=weights)
    layers = dict(recipe.layers)
    if bits.act is not None:
        for name in [layer for block in target.blocks for layer in target.layers_in(block)]:
            layers[name] = replace(layers[name], act=activation(target, state, bits.act, params, name))
    return replace(recipe, layers=layers)


def walk(target: Target, calibration: Calibration, bits: Bits, params: Params, state: dict[str, Tensor]) -> None:
    """CBC: fill the state block by block; `stream` holds what a block is calibrated on, `floats` the float network's."""
    inside = [name for block in target.blocks for name in target.layers_in(block)]
    stream, floats = (
        BlockStream(float_model(target, inside, torch.float32), target, calibration, max_bytes=params.max_bytes)
        for _ in range(2)
    )
    trials = trial_layers(stream.model)
    generator, sign_generator = (torch.Generator().manual_seed(params.seed) for _ in range(2))
    for (block, module), _ in zip(stream, floats, strict=True):
        layers = {name: trials[name] for name in target.layers_in(block)}
        sites = [site for site in target.linear_sites() if any(name in layers for name in site.consumers)]
        if params.has("obs") and params.signs == "random":
            widths = {site.name: target.module(site.consumers[0]).in_features for site in sites}
            state |= {f"{name}/signs": random_signs(width, sign_generator) for name, width in widths.items()}
        if params.has("obs") and params.permutation != "none":
            scores = outlier_scores(stream, module, sites, layers, params.score)
            for site in sites:
                blocks, _ = hadamard_blocks(len(scores[site.name]), params.blocks)
                state[f"{site.name}/order"] = channel_order(scores[site.name], blocks, params.permutation, generator)
        rotated = transforms(target, state, params, sites)
        for name in layers:
            if name in rotated:
                weight_OC = effective_linear(target, name, rotated, frozenset()).weight_OC
                layers[name].transform(rotated[name], weight_OC)
        if bits.act is not None and not bits.act.dynamic:
            state |= input_ranges(stream, module, layers)
        if params.has("clps"):
            state |= clps(target, stream, floats, block, sites, layers, bits, params, state)
        if params.has("cbc"):
            for name, layer in layers.items():
                round_layer(target, layer, state, bits, params, name)
            if params.cbc_depth == "1":
                stream.restart_at(floats)


# --- OBS


def outlier_scores(
    stream: BlockStream, module: torch.nn.Module, sites: list[Site], layers: dict[str, TrialLayer], score: str
) -> dict[str, Tensor]:
    """{site: o_j}, from one pass over the block's inputs."""
    scores = {site.name: ChannelMagnitude(score) for site in sites}
    readers = [[name for name in group if name in layers] for site in sites for group in site.groups]
    site_of = {name: site.name for site in sites for name in site.consumers}
    stream.watch(module, {layers[names[0]].layer: scores[site_of[names[0]]].see for names in readers if names})
    return {name: magnitude.of_channels(name).cpu() for name, magnitude in scores.items()}


def channel_order(score_C: Tensor, blocks: int, permutation: str, generator: torch.Generator) -> Tensor:
    """S: which channel comes to each place. Inside a block the channels keep their order."""
    if permutation == "random":
        return torch.randperm(len(score_C), generator=generator)
    ranked_C = score_C.argsort(descending=True, stable=True)
    members = ranked_C.reshape(blocks, -1) if permutation == "group" else ranked_C.reshape(-1, blocks).T
    return members.sort(dim=1).values.flatten()


def transforms(
    target: Target, state: dict[str, Tensor], params: Params, sites: list[Site] | None = None
) -> dict[str, Transform]:
    """G = S H for the inputs of all layers inside the blocks (or of these sites); shared by the layers that read it."""
    if not params.has("obs"):
        return {}
    found = {}
    inside = {name for block in target.blocks for name in target.layers_in(block)}
    for site in target.linear_sites() if sites is None else sites:
        readers = [name for name in site.consumers if name in inside]
        if not readers:
            continue
        width = target.module(readers[0]).in_features
        block_size = hadamard_blocks(width, params.blocks)[1]
        rotations: tuple[Rotation, ...] = (Hadamard(width, state.get(f"{site.name}/signs"), block_size),)
        if params.permutation != "none":
            rotations = (Permutation(state[f"{site.name}/order"]), *rotations)
        found |= dict.fromkeys(readers, Transform(rotations=rotations))
    return found


# --- CLPS


@dataclass(frozen=True)
class Quantizer:
    """One quantizer under search: the weight of a layer, or the tensor that several layers read."""

    side: str  # weight | act
    layers: tuple[str, ...]
    spec: QuantSpec

    @property
    def one_ratio(self) -> bool:
        """A symmetric range has one end; a dynamic one takes one ratio (`ActQuant.clip`)."""
        return self.spec.symmetric or self.spec.dynamic

    def ends(self, low: float, high: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state entries of a candidate: both ends of the range times these ratios."""
        if self.side == "weight":
            return {f"{name}/weight_ratios": torch.tensor([low, high]) for name in self.layers}
        if self.spec.dynamic:
            return {f"{name}/act_clip": torch.tensor(low) for name in self.layers}
        return {
            f"{name}/act_{end}": ratio * state[f"{name}/act_{end}"]
            for name in self.layers
            for end, ratio in (("low", low), ("high", high))
        }


@dataclass(frozen=True)
class CrossLayerSearch:
    """Range ends of the quantizers of one block, one at a time with everything else in float.

    calls: X of the block as CBC says. expected: Y of each layer in reach. found: what the state says so far.
    """

    target: Target
    stream: BlockStream
    block: str
    layers: dict[str, TrialLayer]
    calls: list[BlockInput]
    expected: dict[str, Tensor]
    found: dict[str, Tensor]
    bits: Bits
    params: Params

    def ends(self, quantizer: Quantizer) -> dict[str, Tensor]:
        """The state entries of (l*, r*)."""
        goal = self.goal(quantizer)

        def loss(low: float, high: float) -> float:
            output = self.outputs(quantizer, low, high, [goal])[goal]
            return float((output - self.expected[goal]).double().square().sum())

        return quantizer.ends(*search(loss, self.params, one_ratio=quantizer.one_ratio), self.found)

    def goal(self, quantizer: Quantizer) -> str:
        """T: of the layers behind it, the one where the probes c ∈ Δ are told apart best; itself if nothing follows."""
        after = list(self.expected)
        after = after[after.index(quantizer.layers[-1]) + 1 :]
        if not after:
            return quantizer.layers[-1]
        error_cL = torch.zeros(len(self.params.probe), len(after), dtype=torch.float64)
        for row, share in enumerate(self.params.probe):
            for name, output in self.outputs(quantizer, share, share, after).items():
                expected = self.expected[name].double()
                error = (output.double() - expected).abs().mean() / expected.abs().mean().clamp(min=1e-12)
                error_cL[row, after.index(name)] = error
        return after[loudest(error_cL, self.params.choose)]

    def outputs(self, quantizer: Quantizer, low: float, high: float, names: list[str]) -> dict[str, Tensor]:
        """Ŷ(l, r) of the named layers."""
        candidate = self.found | quantizer.ends(low, high, self.found)
        one_side = replace(self.bits, **{"act" if quantizer.side == "weight" else "weight": None})
        with ExitStack() as stack:
            for name in quantizer.layers:
                stack.callback(self.layers[name].round)  # back to float
                round_layer(self.target, self.layers[name], candidate, one_side, self.params, name)
            return self.stream.layer_outputs(self.block, self.params.reach, self.calls, names)


def clps(
    target: Target,
    stream: BlockStream,
    floats: BlockStream,
    block: str,
    sites: list[Site],
    layers: dict[str, TrialLayer],
    bits: Bits,
    params: Params,
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    start = target.blocks.index(block)
    near = [name for b in target.blocks[start : start + params.reach + 1] for name in target.layers_in(b)]
    budget = params.search_steps, params.search_samples, params.search_tokens
    calls = stream.sample(*budget)
    own = floats.sample(*budget) if params.target == "fp_network" else calls
    expected = floats.layer_outputs(block, params.reach, own, near)
    searching = CrossLayerSearch(target, stream, block, layers, calls, expected, dict(state), bits, params)
    return {key: value for each in quantizers(sites, layers, bits) for key, value in searching.ends(each).items()}


def quantizers(sites: list[Site], layers: dict[str, TrialLayer], bits: Bits) -> list[Quantizer]:
    found = []
    for group in (group for site in sites for group in site.groups):
        readers = tuple(name for name in layers if name in group)
        if not readers:
            continue
        found += [] if bits.act is None else [Quantizer("act", readers, bits.act)]
        found += [] if bits.weight is None else [Quantizer("weight", (name,), bits.weight) for name in readers]
    return found


def loudest(error_cL: Tensor, choose: str) -> int:
    """argmax_L Var_c ε_c(L), or the largest mean error (peak)."""
    return int((error_cL.var(dim=0, unbiased=False) if choose == "variance" else error_cL.mean(dim=0)).argmax())


def search(loss: Callable[[float, float], float], params: Params, *, one_ratio: bool) -> tuple[float, float]:
    """The ratios with the least loss: pairs (i, i) first, then (i ± local, j ± local) around the best, as long as it moves:
    one round of pairs (2DQuant's) misses the grid's least where that lies far from the diagonal.
    """
    shares = [1 - i / params.grid for i in range(params.grid) if 1 - i / params.grid >= params.lowest - 1e-9]
    losses = {(i, i): loss(share, share) for i, share in enumerate(shares)}
    best, centre = min(losses, key=losses.__getitem__), None
    while best != centre and not one_ratio:
        centre = best
        low, high = (range(max(at - params.local, 0), min(at + params.local + 1, len(shares))) for at in centre)
        losses |= {(i, j): loss(shares[i], shares[j]) for i in low for j in high if (i, j) not in losses}
        best = min(losses, key=losses.__getitem__)
    return shares[best[0]], shares[best[1]]


# --- what the state says about one layer


def weight_ratios(state: dict[str, Tensor], name: str) -> tuple[float, float]:
    low, high = state.get(f"{name}/weight_ratios", torch.ones(2)).tolist()
    return low, high


def activation(target: Target, state: dict[str, Tensor], spec: QuantSpec, params: Params, name: str) -> ActQuant:
    """The quantizer of one layer's input, inside the blocks."""
    if not spec.dynamic:
        if params.act_scale == "token_block":
            raise UserError(
                "method.act_scale=token_block needs dynamic activations; use act_scale=auto or bits.act.dynamic=true"
            )
        return act_quant(spec, state, name)
    grouped = params.has("obs") and params.permutation == "group" and spec.granularity == "per_token"
    if params.act_scale == "token_block" or (params.act_scale == "auto" and grouped):
        width = target.module(name).in_features
        spec = replace(spec, granularity="per_group", group_size=width // hadamard_blocks(width, params.blocks)[0])
    return ActQuant(spec, clip=float(state.get(f"{name}/act_clip", torch.ones(()))))


def round_layer(
    target: Target, layer: TrialLayer, state: dict[str, Tensor], bits: Bits, params: Params, name: str
) -> None:
    """Round one layer of the model in hand as `apply` would."""
    weight_OC = None
    if bits.weight is not None:
        weight_OC = quantize_weight(layer.weight_OC, bits.weight, ratios=weight_ratios(state, name)).dequantize()
    layer.round(weight_OC, None if bits.act is None else activation(target, state, bits.act, params, name))
