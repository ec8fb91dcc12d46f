"""What drawing one sample takes, counted on a model without weights (`skeleton`): multiply-accumulates of each part, calls, memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.calls import count_rows, float_dtype, placed, row_dims
from ditbench.harness.models.macs import Attention, KnownValues, every_product
from ditbench.harness.models.skeleton import module_parts
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.quant.target import QUANTIZABLE, weight_matrix
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt

STEPS = 2  # of the sampler, counted; all its steps are alike
UNREADABLE = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError)


@dataclass
class Counts:
    """Of one sample. macs: multiply-accumulates.

    call_macs: of one row of one call of the transformer. rows: rows of calls that one step makes of one sample. text_macs: of
    encoding its prompts. decode_macs: of the VAE. shapes: {(rows, inputs, outputs) of a linear layer: how often in one call on
    one row}. attention_macs: of call_macs, both products of attention. part_bytes: weights of each part. call_bytes,
    decode_bytes: the most that is live within a call on one row, within the decoding of one sample. layer_elements: inputs and
    outputs of the largest layer. input_bytes: what is recorded of a row of a call. pixels: shape of what is drawn, (H, W) or
    (F, H, W); None if that is not known. unknown: what could not be counted, and why.
    """

    call_macs: int = 0
    rows: int = 1
    text_macs: int = 0
    decode_macs: int = 0
    attention_macs: int = 0
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    part_bytes: dict[str, int] = field(default_factory=dict)
    call_bytes: int = 0
    decode_bytes: int = 0
    layer_elements: int = 0
    input_bytes: int = 0
    latent_elements: int = 0
    pixels: tuple[int, ...] | None = None
    modules: int = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def step_macs(self) -> int:
        """Of one denoising step of one sample."""
        return self.call_macs * self.rows

    @property
    def weights(self) -> int:
        return self.part_bytes["transformer"]


def counted(model: LoadedModel, sampler: Sampler) -> Counts:
    """Count a skeleton. What its pipeline does between its parts runs for real, on tensors without values; where that reads
    a value, `unknown` says what is missing.
    """
    found = Counts(modules=sum(1 for module in model.transformer.modules() if not list(module.children())))
    found.part_bytes = {name: bytes_of(part) for name, part in module_parts(model.pipe).items()}
    if isinstance(model.pipe, TransformerOnly):
        _call(model, found)
        found.rows = 2 if sampler.guidance > 1 and not model.transformer.config.get("guidance_embeds") else 1
        found.pixels = size_of(model.spec.size)
        found.unknown.append("text encoders and VAE, which the model does not have")
        return found
    _call(model, found)
    _sample(model, sampler, found)
    return found


def bytes_of(part: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*part.parameters(), *part.buffers()))


def size_of(size: dict[str, int] | None) -> tuple[int, ...] | None:
    """(H, W) or (F, H, W)."""
    if not size or not {"height", "width"} <= size.keys():
        return None
    return tuple(size[name] for name in ("num_frames", "height", "width") if name in size)


class ValuesStay(KnownValues):
    """What does not come out of a weight keeps its values although its model asks for it beside a weight: masks and positions,
    which text encoders read.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if asked is not None and asked.type == "meta" and not any(map(_without_values, tree_leaves(args))):
            kwargs = kwargs | {"device": torch.device("cpu")}
        return super().__torch_dispatch__(func, types, args, kwargs)


def _without_values(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


class Padding(TorchFunctionMode):
    """Sequences without values side by side: torch would copy them into a table that `ValuesStay` gives values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._C._nn.pad_sequence or not any(each.is_meta for each in args[0]):
            return func(*args, **(kwargs or {}))
        sequences, batch_first = args[0], kwargs["batch_first"] if kwargs and "batch_first" in kwargs else args[1]
        longest, rest = max(map(len, sequences)), sequences[0].shape[1:]
        both = (len(sequences), longest) if batch_first else (longest, len(sequences))
        return next(each for each in sequences if each.is_meta).new_empty((*both, *rest))


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, weights apart; those without values count as if they had some."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        held = (each for part in parts for each in (*part.parameters(), *part.buffers()))
        self._known = {each.untyped_storage()._cdata for each in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        held = storage.nbytes()
        self._known.add(key)
        self.now += held
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, held)

    def _gone(self, key: int, held: int) -> None:
        self._known.discard(key)
        self.now -= held


class Tally:
    """Multiply-accumulates so far."""

    def __init__(self, products: Any, attention: Attention) -> None:
        self.products, self.attention = products, attention

    def __call__(self) -> int:
        flops = self.products.get_total_flops() - self.attention.seen_flops
        return flops // 2 + self.attention.macs


@contextmanager
def counting(pipe: Any) -> Iterator[tuple[Tally, Attention, Live]]:
    parts = module_parts(pipe).values()
    products = every_product()
    with torch.no_grad(), ValuesStay(), Live(parts) as live, products, Padding(), Attention(products) as attention:
        yield Tally(products, attention), attention, live


def _call(model: LoadedModel, found: Counts) -> None:
    """One call on one row."""
    transformer = model.transformer

    def layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs, inputs = weight_matrix(module).shape
        found.shapes[output.numel() // outputs, inputs, outputs] += 1
        found.layer_elements = max(found.layer_elements, args[0].numel() + output.numel())

    with ValuesStay(), torch.no_grad():
        inputs = {rows: model.step_inputs(rows) for rows in (1, 2, 3)}
    dims = row_dims(inputs[2], inputs[3], model.adapter.ROWS)
    assert count_rows(inputs[2], dims) == 2, "one row a sample, without guidance"
    found.input_bytes = sum(t.numel() * t.element_size() for t in tree_leaves(inputs[1]) if isinstance(t, Tensor))
    handles = [each.register_forward_hook(layer) for each in transformer.modules() if isinstance(each, QUANTIZABLE)]
    try:
        with counting(model.pipe) as (tally, attention, live):
            transformer(**placed(inputs[1], float_dtype(transformer), "cpu"))
            found.call_macs, found.attention_macs, found.call_bytes = tally(), attention.macs, live.peak
    finally:
        for handle in handles:
            handle.remove()


def _sample(model: LoadedModel, sampler: Sampler, found: Counts) -> None:
    """A sample from prompt to pixels, with few steps."""
    prompts = (Prompt("a red circle"),) if model.adapter.CONDITION == PROMPTS else ()
    conditions = Conditions((0,), None if prompts else torch.zeros(1, dtype=torch.long), prompts)
    spent: Counter[str] = Counter()
    after_steps: dict[str, int] = {}

    def around(name: str, part: nn.Module) -> Iterator[Callable[[], None]]:
        begun: list[int] = []
        yield part.register_forward_pre_hook(lambda *_: begun.append(tally())).remove

        def left(*_: Any) -> None:
            spent[name] += tally() - begun.pop()
            if name == "transformer":  # what is live from here on is the decoder's
                after_steps.update(before=live.now)
                live.peak = live.now

        yield part.register_forward_hook(left).remove

    removes: list[Callable[[], None]] = []
    try:
        with counting(model.pipe) as (tally, _, live):
            for name, part in module_parts(model.pipe).items():
                removes += around(name, part)
            drawn = model.adapter.sample(
                model.pipe, model.transformer, conditions, Sampler(sampler.kind, STEPS, sampler.guidance)
            )
            total, peak = tally(), live.peak
    except UNREADABLE as error:
        first_line = str(error).strip().split("\n")[0][:100]
        found.unknown.append(f"text encoders and VAE ({first_line})")
        found.rows = 2 if sampler.guidance > 1 and not _guided_inside(model) else 1
        found.pixels = found.pixels or size_of(model.spec.size)
        return
    finally:
        for remove in removes:
            remove()
    found.rows = round(spent["transformer"] / STEPS / found.call_macs)
    found.text_macs = sum(macs for name, macs in spent.items() if name not in ("transformer", "vae"))
    found.decode_macs = total - spent["transformer"] - found.text_macs
    found.decode_bytes = peak - after_steps["before"]
    found.latent_elements = drawn.latents.numel()
    assert drawn.pixels is not None
    shape = drawn.pixels.shape  # (1, 3, H, W) or (1, F, 3, H, W)
    found.pixels = (*shape[1:-3], *shape[-2:])


def _guided_inside(model: LoadedModel) -> bool:
    """Whether the transformer is told the guidance instead of being called twice."""
    return bool(getattr(model.transformer.config, "guidance_embeds", False))
