"""FlatQuant (Sun et al. 2024, arXiv:2410.09426) on a DiT: an invertible map before every quantizer, learned block by block with clips of both sides.

    Y = X Wᵀ = ((X / s) P)(W s P⁻ᵀ)ᵀ,   P = P₁ ⊗ P₂,   P_i = U_i diag(d_i) V_iᵀ
    min over s, P, clips of   mean |block(x; Q(X′), Q(W′)) − block(x)|²,   x: the float network's input of the block

    paper / release   here              meaning
    P₁, P₂            KroneckerMap      near-square factors of the width, so that the map costs little online
    U, V              U₀ Cayley(A)      orthogonal, from a random start, A skew-symmetric and learned
    c (diagonal)      scale_C           SmoothQuant's factor with α = 0.3 at first; folded where a producer is known
    α_w, α_a          clips             shares σ(·) of a row's two ends and of a token's range that are kept; σ(4) at first
    lr, 10 lr         learning_rate     5e-3 (form=published); ten times as much for clips; cosine

Departs from the paper: d, and s, are learned in their logarithms, so that they stay positive; Adam without weight decay; one clip for both
ends of a token; of a symmetric range the smaller end is not cut by itself (the release clamps both ends of a weight's rows). One P for all
layers that read a tensor. Before an attention's output layer P is a Kronecker product of the whole width (there: across
heads, the part inside a head merged into V), and k and v, which a language model caches, have none. By default 100 iterations per block at a learning rate of 1e-2, for a CPU's budget (form=published: the
release's 15 epochs at 5e-3). Layers outside the blocks are rounded to nearest. Static activations take the range that calibration finds behind P, without a clip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends import simulate
from ditbench.harness.backends.base import Kernel
from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.block_stream import MAX_BYTES, BlockInput, BlockStream
from ditbench.harness.calibration.channel_statistics import channel_stats, of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.blockwise import weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import affine_from_range, from_codes, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import Bits, QuantSpec, needs_integers
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import KroneckerMap, Transform


@dataclass(frozen=True)
class Params:
    """Defaults are the release's but for the budget of iterations."""

    alpha: float = 0.3  # of the scale at the start
    iterations: int = 100  # per block
    batch_size: int = 4
    batch_tokens: int = 1024  # of a minibatch, at most: fewer rows of a model with longer sequences, but one
    learning_rate: float = 1e-2  # Adam, with a cosine to a thousandth
    clip_start: float = 4.0  # σ(4) = 0.982
    floor: float = 1e-5  # on both ranges and on s: a dead channel must not divide by zero
    seed: int = 0
    max_bytes: int = MAX_BYTES  # of the hidden states kept at a time: so many rows are used

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"flatquant: alpha must be in [0, 1], got {self.alpha}")
        if self.iterations < 0 or self.batch_size < 1 or self.batch_tokens < 1:
            raise ValueError(
                "flatquant: iterations must be at least 0, batch_size and batch_tokens at least 1; "
                f"got {self.iterations}, {self.batch_size}, {self.batch_tokens}"
            )


FORMS = {
    PUBLISHED: Form({"iterations": 480, "learning_rate": 5e-3}, {"calibration.n": 128})
}  # 15 epochs of 128 samples, four at a time


def check_bits(bits: Bits) -> None:
    needs_integers("flatquant", bits.weight, bits.act)


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    check_bits(bits)
    for name in target.layers:
        for spec in (bits.weight, bits.act):
            if spec is not None:
                spec.check_width(name, target.module(name).weight[0].numel())
    learned = learn(target, calibration, bits, params) if bits.weight is not None or bits.act is not None else {}
    state: dict[str, Tensor] = {}
    for name, site in learned.items():
        state |= {f"{name}/{part}": value for part, value in site.state().items()}
    transforms, folded = placement(target, state)
    clips = {layer: clip for site in learned.values() for layer, clip in site.clips().items()}
    for layer, (low_R, high_R, act) in clips.items():
        if bits.weight is not None:
            weight_OC = effective_linear(target, layer, transforms, folded).weight_OC
            state |= weight_state(layer, clipped_weight(weight_OC, bits.weight, low_R, high_R))
        if bits.act is not None and bits.act.dynamic:
            state[f"{layer}/act_clip"] = act
    return state | static_ranges(target, bits, calibration, transforms, folded)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = {n: weight_from_state(n, state, bits.weight) for n in target.layers if f"{n}/codes" in state}
    recipe = nearest(target, bits, state, *placement(target, state), weights=weights)

    def with_clip(name: str, layer: LayerRecipe) -> LayerRecipe:
        if layer.act is None or f"{name}/act_clip" not in state:
            return layer
        return replace(layer, act=replace(layer.act, clip=float(state[f"{name}/act_clip"])))

    return replace(recipe, layers={name: with_clip(name, layer) for name, layer in recipe.layers.items()})


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in target.linear_sites():
        if f"{site.name}/left" in state:
            flat = KroneckerMap(state[f"{site.name}/left"], state[f"{site.name}/right"])
            by_site[site.name] = Transform(scale_C=state[f"{site.name}/scale"], rotations=(flat,))
    return place(target, by_site)


def learn(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, FlatSite]:
    """{site: what was learned for it}, one block after the other, each on the float network's inputs and outputs."""
    stats = channel_stats(target, calibration)
    exact = float_copy(target, dtype=torch.float32, device=target.device)
    # every layer of the protocol as one that can be told what to compute
    model = build(
        target,
        ModelRecipe({name: LayerRecipe() for name in target.layers}),
        dtype=torch.float32,
        device=target.device,
        backend=simulate.NAME,
    )
    layers = quant_layers(model)
    generator = torch.Generator().manual_seed(params.seed)
    learned: dict[str, FlatSite] = {}
    stream = BlockStream(exact, target, calibration, max_bytes=params.max_bytes // 2)
    for name, _ in stream:
        sites = {}
        for site in sites_in(target, name):
            start_C = smoothing_scale(
                of_site(stats, site).absmax_C, weight_absmax(target, site), params.alpha, params.floor
            )
            sites[site.name] = FlatSite(target, site, start_C, bits, params, generator)
        for flat in sites.values():
            flat.into(layers)
        block = model.get_submodule(name)
        targets = list(stream.outputs(exact.get_submodule(name)))
        descend(block, stream, targets, list(sites.values()), params, generator)
        learned |= sites
    return learned


def sites_in(target: Target, block: str) -> list[Site]:
    """Those of whose layers the protocol quantizes some, and all stand in the block."""
    inside = f"{block}."
    return [site for site in target.linear_sites() if all(name.startswith(inside) for name in site.consumers)]


def descend(
    block: nn.Module,
    stream: BlockStream,
    targets: list[Tensor],
    sites: list[FlatSite],
    params: Params,
    generator: torch.Generator,
) -> None:
    maps = [parameter for site in sites for parameter in site.map_parameters()]
    clips = [parameter for site in sites for parameter in site.clip_parameters()]
    if not maps or params.iterations == 0:
        return
    groups = [{"params": maps, "lr": params.learning_rate}, {"params": clips, "lr": 10 * params.learning_rate}]
    optimizer = torch.optim.Adam(groups, foreach=False)  # as on the CPU; torch would round otherwise on a GPU
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=params.iterations, eta_min=1e-3 * params.learning_rate
    )
    every = [*maps, *clips]
    for _ in range(params.iterations):
        call, target_BTC = minibatch(stream, targets, params, generator)
        with torch.enable_grad():
            loss = F.mse_loss(stream.run(block, call.hidden_BTC, call.kwargs), target_BTC)
            gradients = torch.autograd.grad(loss / loss.detach().clamp(min=1e-30), every, allow_unused=True)
        for parameter, gradient in zip(every, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        cosine.step()


def minibatch(
    stream: BlockStream, targets: list[Tensor], params: Params, generator: torch.Generator
) -> tuple[BlockInput, Tensor]:
    """Random rows of one call: of one denoising step."""
    index = int(torch.randint(len(stream.inputs), (), generator=generator))
    call = stream.inputs[index]
    wanted = min(params.batch_size, max(1, params.batch_tokens // call.tokens), call.num_rows)
    rows = torch.randperm(call.num_rows, generator=generator)[:wanted].sort().values
    return call.rows(rows), targets[index][rows.to(targets[index].device)]


class FlatSite:
    """s, P and the clips of one site's layers, as they are learned; float32 on the target's device."""

    def __init__(
        self, target: Target, site: Site, scale_C: Tensor, bits: Bits, params: Params, generator: torch.Generator
    ) -> None:
        self.bits, device = bits, target.device
        self.log_scale_C = scale_C.to(device).float().log().requires_grad_()
        left, right = near_square(len(scale_C))
        self.left, self.right = (Factor(size, generator, device) for size in (left, right))
        self.weights = {name: target.weight(name).float() for name in site.consumers if name in target.layers}
        start = torch.tensor(params.clip_start, device=device)
        rows = {name: rows_of(weight_OC, bits.weight) for name, weight_OC in self.weights.items()}
        # logits of: the shares of each row's ends, that of a token's
        self.logits = {
            name: [start.expand(size).clone().requires_grad_() for size in (rows[name], rows[name], 1)] for name in rows
        }

    def map_parameters(self) -> list[Tensor]:
        return [self.log_scale_C, *self.left.parameters(), *self.right.parameters()]

    def clip_parameters(self) -> list[Tensor]:
        return [logit for each in self.logits.values() for logit in each]

    def into(self, layers: dict[str, Any]) -> None:
        """Let the layers of the model compute with what is learned."""
        for name in self.weights:
            layers[name].kernel = FlatKernel(self, name)

    def of_input(self, x: Tensor) -> Tensor:
        return kronecker(x / self.log_scale_C.exp(), self.left.matrix(), self.right.matrix())

    def of_weight(self, name: str) -> Tensor:
        return kronecker(
            self.weights[name] * self.log_scale_C.exp(), self.left.inverse_transposed(), self.right.inverse_transposed()
        )

    def clips(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """{layer: shares of the low and high ends (R,), of a token's range ()}, on the CPU."""
        found = {}
        for name, logits in self.logits.items():
            low_R, high_R, act_1 = (logit.detach().sigmoid().cpu() for logit in logits)
            found[name] = low_R, high_R, act_1[0].clone()
        return found

    def state(self) -> dict[str, Tensor]:
        """float64 matrices, and the scale."""
        left, right = (factor.matrix(torch.float64).detach().cpu() for factor in (self.left, self.right))
        return {"scale": self.log_scale_C.detach().exp().cpu(), "left": left, "right": right}


class Factor:
    """U diag(d) Vᵀ with U = U₀ Cayley(A) and V = V₀ Cayley(B); A, B skew-symmetric, 0 at first, and d = 1."""

    def __init__(self, size: int, generator: torch.Generator, device: torch.device) -> None:
        drawn = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
        self.starts = [torch.linalg.qr(each).Q.float().to(device) for each in drawn]
        self.turns = [torch.zeros(size, size, device=device).requires_grad_() for _ in drawn]
        self.log_stretch = torch.zeros(size, device=device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [*self.turns, self.log_stretch]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._made(self.log_stretch, dtype)

    def inverse_transposed(self) -> Tensor:
        return self._made(-self.log_stretch, torch.float32)

    def _made(self, log_stretch: Tensor, dtype: torch.dtype) -> Tensor:
        u, v = (start.to(dtype) @ cayley(turn.to(dtype)) for start, turn in zip(self.starts, self.turns, strict=True))
        return u * log_stretch.to(dtype).exp() @ v.T


class FlatKernel(Kernel):
    """Q(X′) Q(W′)ᵀ, of which gradients pass straight through the rounding."""

    def __init__(self, site: FlatSite, name: str) -> None:
        super().__init__()
        self.site, self.name = site, name

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        site, (low_R, high_R, act_1) = self.site, self.site.logits[self.name]
        x, weight_OC = site.of_input(x), site.of_weight(self.name)
        if site.bits.act is not None:
            x = straight_through(x, replace(site.bits.act, dynamic=True), act_1.sigmoid(), act_1.sigmoid())
        if site.bits.weight is not None:
            shape = (-1, 1) if site.bits.weight.granularity == "per_group" else (-1,)
            ends = (logit.sigmoid().reshape(shape)[..., None] for logit in (low_R, high_R))
            weight_OC = straight_through(weight_OC, site.bits.weight, *ends)
        return F.linear(x, weight_OC)


def straight_through(x: Tensor, spec: QuantSpec, low_share: Tensor, high_share: Tensor) -> Tensor:
    """Rounded and clamped, with the gradient of the clamp alone; shares of the two ends of every range that are kept."""
    shape = x.shape
    if spec.granularity == "per_group":
        x = x.unflatten(-1, (-1, spec.group_size))
    over: Any = -1
    if spec.granularity == "per_tensor":  # of an activation: of one sample
        over = tuple(range(1 if spec.dynamic else 0, x.ndim))
    scale, zero_point = affine_from_range(
        low_share * x.amin(over, keepdim=True), high_share * x.amax(over, keepdim=True), spec
    )
    scaled = x / scale
    codes = scaled + (scaled.round() - scaled).detach()
    if zero_point is not None:
        codes = codes + zero_point
    return from_codes(codes.clamp(spec.quant_min, spec.quant_max), scale, zero_point).reshape(shape)


def clipped_weight(weight_OC: Tensor, spec: QuantSpec, low_R: Tensor, high_R: Tensor):
    """To nearest, with the learned shares of each row's ends."""
    low_R, high_R = low_R.to(weight_OC.device), high_R.to(weight_OC.device)
    shares = (low_R[:, None], high_R[:, None]) if spec.granularity == "per_group" else (low_R, high_R)
    return quantize_weight(weight_OC, spec, ratios=shares)  # type: ignore[arg-type]


def rows_of(weight_OC: Tensor, spec: QuantSpec | None) -> int:
    """How many pairs of shares a weight has."""
    return 1 if spec is None or spec.granularity == "per_tensor" else len(weight_OC)


def near_square(width: int) -> tuple[int, int]:
    """a · b = width, a ≤ b, as near to each other as can be."""
    left = max(size for size in range(1, int(width**0.5) + 1) if width % size == 0)
    return left, width // left


def kronecker(x: Tensor, left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """x · (L ⊗ R)."""
    return (left_aa.T @ (x.unflatten(-1, (len(left_aa), len(right_bb))) @ right_bb)).flatten(-2)


def cayley(turn: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ of the skew-symmetric part of a matrix: orthogonal."""
    skew = (turn - turn.T) / 2
    eye = torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    return torch.linalg.solve(eye + skew, eye - skew)
