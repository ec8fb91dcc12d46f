"""Block reconstruction (BRECQ, Li et al. 2021, arXiv:2102.05426): rounding learned so that a block's output stays.

For one block after the other, with f the float block and f̂ the quantized one,

    min over α, δ_X of   mean over samples and tokens of Σ_c |f̂(x̂) − f(x)|_c²  +  λ Σ (1 − |2 h(α) − 1|^b)

where x̂ is what the quantized blocks before give and x what the float ones give. α decides the rounding of each weight
(`harness.quant.adaround`), δ_X are the scales of static activation quantizers. b falls linearly after a warm-up without
the regulariser. With QDrop (Wei et al. 2022, arXiv:2203.05740) elements of x̂, and of the layers' quantized inputs, are
replaced by their float values at random during training.

Layers outside the blocks keep the rounding they come with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends import simulate
from ditbench.harness.backends.base import Kernel
from ditbench.harness.build.attention import OPERANDS, QuantAttention, quantize_attention, set_attention
from ditbench.harness.build.build import build, clock_of, quant_layers
from ditbench.harness.calibration.block_stream import MAX_BYTES, BlockInput, BlockStream
from ditbench.harness.calibration.on_disk import StoredTensor
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.blockwise import weight_from_state, weight_state
from ditbench.harness.fitting.rounding import act_quant
from ditbench.harness.quant.adaround import AdaRound, LearnedAct
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, ModelRecipe, to_device
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.target import Target

ALL_TOKENS = 2**31  # batch_tokens that bound nothing
STREAMS = 3  # hidden states kept at a time: quantized inputs, float inputs, float outputs


@dataclass(frozen=True)
class Reconstruction:
    """What methods with block reconstruction have in their Params.

    The papers run 20,000 iterations per block at a learning rate of 1e-3. The defaults are a budget for the CPU: 100
    iterations, at a learning rate at which α still gets across 0.
    """

    reconstruct: str = "block"  # block | none: weights rounded to nearest, ranges as found
    error_over: str = "channels"  # what the squared error is summed over, before its mean: channels | tokens
    float_inputs: bool = False  # learn the rounding on inputs in float, before the scales (scale_iterations > 0)
    iterations: int = 100  # per block
    batch_size: int = 16
    batch_tokens: int = 1024  # of a minibatch, at most: fewer rows of a model with longer sequences, but one
    learning_rate: float = 3e-2  # Adam, of α
    scale_learning_rate: float = 4e-5  # Adam with cosine to 0, of static activation scales
    scale_iterations: int = 0  # 0: scales are learned together with the rounding; otherwise after it
    scale_power: float = 2.0  # of the error while scales are learned after the rounding
    regulariser: float = 0.01  # λ
    warmup: float = 0.2  # share of the iterations without the regulariser
    sharpness_start: float = 20.0  # b
    sharpness_end: float = 2.0
    input_prob: float = 1.0  # share of the block's inputs from the quantized network; the rest is float (QDrop)
    act_prob: float = 1.0  # share of the layers' inputs that are quantized while training (QDrop)
    seed: int = 0  # of minibatches and drops
    max_bytes: int = MAX_BYTES  # of the hidden states kept at a time: so many rows are used

    def __post_init__(self) -> None:
        method = type(self).__module__.rpartition(".")[2]
        if self.reconstruct not in ("block", "none"):
            raise ValueError(f"{method}: reconstruct must be block or none, got {self.reconstruct!r}")
        if self.error_over not in ("channels", "tokens"):
            raise ValueError(f"{method}: error_over must be channels or tokens, got {self.error_over!r}")
        if self.float_inputs and self.scale_iterations == 0:
            raise ValueError(
                f"{method}: float_inputs=true leaves the scales to a pass of their own; set scale_iterations to at least 1"
            )
        for name in ("iterations", "batch_size", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{method}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("scale_power", "sharpness_start", "sharpness_end"):  # at 1, |v|^power has a kink where v is 0
            if getattr(self, name) <= 1:
                raise ValueError(f"{method}: {name} must be above 1, got {getattr(self, name)}")
        for name in ("warmup", "input_prob", "act_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{method}: {name} must be in [0, 1], got {getattr(self, name)}")


def reconstruct(
    target: Target, recipe: ModelRecipe, calibration: Calibration, settings: Reconstruction
) -> dict[str, Tensor]:
    """What was learned, as state: codes of the layers in blocks, range ends of their static activation quantizers.

    recipe: where learning starts, rounded to nearest. Nothing is returned if there is nothing to learn.
    """
    learnable = any(layer.weight is not None or _is_static(layer.act) for layer in recipe.layers.values())
    if settings.reconstruct == "none" or not learnable:
        return {}
    exact = build(target, recipe.without_rounding(), dtype=torch.float32, device=target.device)
    quantized = build(target, recipe, dtype=torch.float32, device=target.device, backend=simulate.NAME)
    floats = BlockStream(exact, target, calibration, max_bytes=settings.max_bytes // STREAMS)
    stream = BlockStream(quantized, target, calibration, max_bytes=settings.max_bytes // STREAMS)
    generator = torch.Generator().manual_seed(settings.seed)
    float_layers = quant_layers(exact)
    state: dict[str, Tensor] = {}
    for name, block in stream:
        float_inputs = [call.state for call in floats.inputs]
        floats.advance(exact.get_submodule(name))
        samples = _Samples(stream, float_inputs, [call.state for call in floats.inputs], settings, generator)
        learner = _BlockLearner(quantized, name, recipe, float_layers, settings, generator)
        learner.learn(block, samples)
        state |= learner.put_back(recipe)
    return state


def learned_weights(target: Target, state: dict[str, Tensor], spec: QuantSpec | None) -> dict[str, QuantizedWeight]:
    """The rounded weights in the state of `reconstruct`, for `rounding.nearest`."""
    return {n: weight_from_state(n, state, spec) for n in target.layers if spec is not None and f"{n}/codes" in state}


def sharpness(iteration: int, settings: Reconstruction) -> float | None:
    """b at an iteration, or None in the warm-up."""
    first = settings.warmup * settings.iterations
    if iteration < first:
        return None
    left = 1 - (iteration - first) / (settings.iterations - first)
    return settings.sharpness_end + (settings.sharpness_start - settings.sharpness_end) * left


def output_error(output_BTC: Tensor, target_BTC: Tensor, power: float = 2.0, over: str = "channels") -> Tensor:
    """Σ over channels (or tokens) of |error|^power, mean over the rest."""
    return (output_BTC - target_BTC).abs().pow(power).sum(-1 if over == "channels" else -2).mean()


class LearnedKernel(Kernel):
    """Ŵ(α) on the quantized input; either may be missing."""

    def __init__(self, weight_OC: Tensor, rounding: AdaRound | None, act: Callable | None) -> None:
        super().__init__()
        self.weight_OC, self.rounding, self.act = weight_OC, rounding, act

    def freeze(self) -> None:
        """From here on the weight is the rounded one."""
        if self.rounding is not None:
            self.weight_OC, self.rounding = self.rounding.hard().dequantize(), None

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        x = x if self.act is None else self.act(x, step)
        return F.linear(x, self.weight_OC if self.rounding is None else self.rounding.soft_OC())


class _LearnedAttention(QuantAttention):
    """Attention with operand quantizers that gradients pass through."""

    def __init__(self, acts: dict[str, Callable | None], base: QuantAttention) -> None:
        self.acts, self.clock, self.observe = acts, base.clock, None

    def _operand(self, name: str, tensor: Tensor) -> Tensor:
        act = self.acts[name]
        return tensor if act is None else act(tensor, self.clock.step)


class _BlockLearner:
    """The quantizers of one block, made learnable in place and put back rounded, on the model's device."""

    def __init__(
        self,
        model: nn.Module,
        block: str,
        recipe: ModelRecipe,
        float_layers: dict[str, Any],
        settings: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        self.model, self.settings, self.generator = model, settings, generator
        inside = f"{block}."
        self.layers = {n: q for n, q in quant_layers(model).items() if n.startswith(inside) and n in recipe.layers}
        self.attention = [name for name in recipe.attention if name.startswith(inside)]
        self.roundings: dict[str, AdaRound] = {}
        self.acts: dict[str, LearnedAct] = {}
        self.in_float = False  # whether inputs are left alone for now
        device = clock_of(model).step.device
        for name, layer in self.layers.items():
            weight_OC, start = float_layers[name].kernel.weight_OC, to_device(recipe.layers[name].weight, device)
            if start is not None:
                self.roundings[name] = AdaRound(weight_OC, start)
            layer.kernel = LearnedKernel(weight_OC, self.roundings.get(name), self._act(name, recipe.layers[name].act))
        for name in self.attention:
            acts = {o: self._act(f"{name}.{o}", getattr(recipe.attention[name], o)) for o in OPERANDS}
            base = QuantAttention(recipe.attention[name], clock_of(model))
            set_attention(model, name, _LearnedAttention(acts, base))

    def learn(self, block: nn.Module, samples: _Samples) -> None:
        settings = self.settings
        static = [act for act in self.acts.values() if act.scale_G is not None]
        together = static if settings.scale_iterations == 0 else []
        if self.roundings or together:
            self.in_float = settings.float_inputs
            self._descend(block, samples, list(self.roundings.values()), together, settings.iterations)
            self.in_float = False
        for layer in self.layers.values():
            layer.kernel.freeze()
        if static and settings.scale_iterations:
            self._descend(block, samples, [], static, settings.scale_iterations, settings.scale_power)

    def put_back(self, recipe: ModelRecipe) -> dict[str, Tensor]:
        """Plain kernels with what was learned, for the blocks behind → the state that makes them again."""
        state: dict[str, Tensor] = {}
        for name, rounding in self.roundings.items():
            state |= weight_state(name, rounding.hard())
        for name, act in self.acts.items():
            if act.scale_G is not None:
                state |= {key: end.cpu() for key, end in act.range_state(name).items()}

        def quantizer(name: str, quant: ActQuant | None) -> ActQuant | None:
            if quant is None or quant.scale is None:
                return quant
            groups = quant.scale.group_of_step
            known = state if groups is None else state | {f"{name}/act_group_of_step": groups}
            return act_quant(quant.spec, known, name)

        device = clock_of(self.model).step.device
        for name, layer in self.layers.items():
            learned = self.roundings[name].hard() if name in self.roundings else None
            ready = to_device(LayerRecipe(weight=learned, act=quantizer(name, recipe.layers[name].act)), device)
            layer.kernel = simulate.make_kernel(ready, layer.kernel.weight_OC)
        for name in self.attention:
            operands = {o: quantizer(f"{name}.{o}", getattr(recipe.attention[name], o)) for o in OPERANDS}
            quantize_attention(self.model, name, AttentionRecipe(**operands), clock_of(self.model), device)
        return state

    def _act(self, name: str, quant: ActQuant | None) -> Callable | None:
        if quant is None:
            return None
        self.acts[name] = act = LearnedAct(to_device(quant, clock_of(self.model).step.device))
        if self.settings.act_prob == 1 and not self.settings.float_inputs:
            return act

        def sometimes(x: Tensor, step: Tensor | None) -> Tensor:
            if self.in_float:
                return x
            return _mix(act(x, step), x, self.settings.act_prob, self.generator)

        return sometimes

    def _descend(
        self,
        block: nn.Module,
        samples: _Samples,
        roundings: list[AdaRound],
        static: list[LearnedAct],
        iterations: int,
        power: float = 2.0,
    ) -> None:
        settings = self.settings
        alphas, scales = [r.alpha_OGg for r in roundings], [act.scale_G for act in static]
        adam = partial(torch.optim.Adam, foreach=False)  # as on the CPU; torch would round otherwise on a GPU
        optimizers = [adam(alphas, lr=settings.learning_rate)] if alphas else []
        if scales:
            optimizers.append(adam(scales, lr=settings.scale_learning_rate))
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], T_max=iterations)
        for iteration in range(iterations):
            with torch.enable_grad():
                hidden_BTC, target_BTC, kwargs = samples.draw()
                output_BTC = samples.stream.run(block, hidden_BTC, kwargs)
                loss = output_error(output_BTC, target_BTC, power, settings.error_over)
                b = sharpness(iteration, settings) if roundings else None
                if b is not None:
                    loss = loss + settings.regulariser * sum(rounding.regulariser(b) for rounding in roundings)
                gradients = torch.autograd.grad(loss, [*alphas, *scales])
            for parameter, gradient in zip([*alphas, *scales], gradients, strict=True):
                parameter.grad = gradient
            for optimizer in optimizers:
                optimizer.step()
            if scales:
                cosine.step()
            for act in static:
                act.keep_positive()


class _Samples:
    """Random minibatches of a block's inputs and of the float block's outputs, mixed over denoising steps.

    Where tables depend on the step, a minibatch is of one step, with the clock on it.
    """

    def __init__(
        self,
        stream: BlockStream,
        float_inputs: list[Tensor | StoredTensor],
        targets: list[Tensor | StoredTensor],
        settings: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        self.stream, self.float_inputs, self.targets = stream, float_inputs, targets
        self.settings, self.generator = settings, generator
        self.call_N = torch.cat([torch.full((c.num_rows,), i) for i, c in enumerate(stream.inputs)])
        self.row_N = torch.cat([torch.arange(c.num_rows) for c in stream.inputs])
        self.batch_size = min(settings.batch_size, max(1, settings.batch_tokens // stream.inputs[0].tokens))
        self.by_step = clock_of(stream.model).num_steps is not None
        self.all_alike = all(stream.inputs[0].is_like(call) for call in stream.inputs)

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """hidden_BTC, target_BTC, and the block's other arguments."""
        pool_N = torch.arange(len(self.call_N))
        if self.by_step or not self.all_alike:
            chosen = self.call_N[torch.randint(len(self.call_N), (), generator=self.generator)]
            pool_N = pool_N[self.call_N == chosen]
        picked_B = pool_N[torch.randint(len(pool_N), (self.batch_size,), generator=self.generator)]
        picked_B = picked_B.sort().values
        parts = [
            (int(call), self.row_N[picked_B[self.call_N[picked_B] == call]]) for call in self.call_N[picked_B].unique()
        ]
        (inputs,) = BlockInput.side_by_side([self.stream.inputs[call].rows(rows) for call, rows in parts])
        self.stream.model.clock.set(inputs.step, self.stream.calibration.num_steps)
        hidden_BTC = inputs.hidden_BTC
        if self.settings.input_prob < 1:
            float_BTC = torch.cat([self.float_inputs[call][rows] for call, rows in parts])
            hidden_BTC = _mix(hidden_BTC, float_BTC, self.settings.input_prob, self.generator)
        target_BTC = torch.cat([self.targets[call][rows] for call, rows in parts])
        return hidden_BTC, target_BTC, inputs.kwargs


def _mix(quantized: Tensor, exact: Tensor, prob: float, generator: torch.Generator) -> Tensor:
    """Each element quantized with this probability, otherwise as it was (QDrop); drawn on the CPU, the same everywhere."""
    drawn = torch.rand(exact.shape, generator=generator).to(exact.device)
    return torch.where(drawn < prob, quantized, exact)


def _is_static(act: ActQuant | None) -> bool:
    return act is not None and act.scale is not None
