"""Kernel launches and bytes of one block on the CUDA design, counted without a device: bf16, each layer by itself, and as it is.

    python bench/launches.py                      # writes results/bench/launches.json

Blocks of diffusers at true width run eagerly on tensors without values, and each operator that would start a kernel is counted once: our
own rows and products by their operators, attention as one kernel. Views start nothing. Bytes are those of an operator's tensors, each
read or written once: what a cache saves, and what tiles read again, is not in them. So nothing here is measured, and how long a launch
takes is another question. Before: every layer quantizes what it reads, and what stands between the layers is torch's. Now: layers that read
one tensor share that, norms hand over codes, products end in their activation, and gates, positions and norms of heads are one pass each.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditbench.harness.backends import between, cuda_fp8, cuda_int8, cuda_w4a8
from ditbench.harness.build.fusion import fuse
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.shared_inputs import share_inputs
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import bits_of
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.transforms import Transform

OUT = Path(__file__).resolve().parent.parent / "results" / "bench" / "launches.json"
META = torch.device("meta")
TOKENS = (256, 4096)
BACKENDS = {"w8a8": cuda_int8, "w4a8": cuda_w4a8, "fp8": cuda_fp8}
BF16, BEFORE, NOW = "bf16", "before", "now"
QUANTIZED = (
    "attn",
    "ff",
    "proj_mlp",
    "proj_out",
)  # parts of a block whose linear layers a protocol quantizes by default
KINDS = {  # operators that are told apart; all others are elementwise
    "quantize_rows": "rows",
    "normed_rows": "rows",  # with the norm and its modulation
    "normed": "norms",
    "activate": "activations",
    "int_product": "products",
    "_scaled_mm": "products",
    "addmm": "products",
    "mm": "products",
    "bmm": "products",
    "native_layer_norm": "norms",
    "gelu": "activations",
    "silu": "activations",
}
FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "promote_types",
}


class Launches(TorchDispatchMode):
    """What would be launched by what runs inside it: launches and bytes by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in FREE or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            return found
        given = tensors((args, kwargs))
        if func._schema.name.startswith("ditbench::") and not given[0].is_contiguous():
            self.add("elementwise", given[:1] * 2)  # it copies before it starts
        self.add(KINDS.get(name, "elementwise"), given + tensors(found))
        return found

    def add(self, kind: str, moved: list[Tensor]) -> None:
        self.launches[kind] += 1
        self.bytes[kind] += sum(map(size, moved))


class OneKernel(TorchFunctionMode):
    """Attention as the one kernel that a CUDA device has for it: without values torch would take it apart."""

    def __init__(self, counted: Launches) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        self.counted.add("attention", [*given, given[0]])
        return torch.empty_like(given[0])


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Bytes of its values; what an expanded tensor repeats is read once."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()


@dataclass(frozen=True)
class Shape:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]  # of the number of image tokens


def tokens_of(count: int, width: int) -> Tensor:
    return torch.empty(1, count, width, dtype=torch.bfloat16, device=META)


def basic(norm: str, cross: int | None, **more: Any) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(
        1152,
        16,
        72,
        cross_attention_dim=cross,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type=norm,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        **more,
    )


def dit_inputs(count: int) -> dict[str, Any]:
    index = torch.zeros(1, dtype=torch.long, device=META)
    return {"hidden_states": tokens_of(count, 1152), "timestep": index, "class_labels": index}


def pixart_inputs(count: int) -> dict[str, Any]:
    told = {"encoder_hidden_states": tokens_of(120, 1152), "timestep": tokens_of(1, 6 * 1152)[0]}
    return {"hidden_states": tokens_of(count, 1152), **told}


def flux(name: str) -> nn.Module:
    from diffusers.models.transformers import transformer_flux

    return getattr(transformer_flux, name)(dim=3072, num_attention_heads=24, attention_head_dim=128)


def flux_inputs(count: int) -> dict[str, Any]:
    """With 512 text tokens."""
    turns = tuple(torch.empty(count + 512, 128, device=META) for _ in range(2))
    return {
        "hidden_states": tokens_of(count, 3072),
        "encoder_hidden_states": tokens_of(512, 3072),
        "temb": tokens_of(1, 3072)[0],
        "image_rotary_emb": turns,
    }


SHAPES = {
    "DiT-XL/2": Shape(lambda: basic("ada_norm_zero", None, num_embeds_ada_norm=1000), dit_inputs),
    "PixArt": Shape(lambda: basic("ada_norm_single", 1152), pixart_inputs),
    "FLUX, two streams": Shape(lambda: flux("FluxTransformerBlock"), flux_inputs),
    "FLUX, one stream": Shape(lambda: flux("FluxSingleTransformerBlock"), flux_inputs),
}


@contextmanager
def as_if_on_a_device() -> Iterator[None]:
    """Our CUDA backends take layers here, and what stands between them is theirs: built, and never run."""
    asked = {backend: backend.unsupported for backend in BACKENDS.values()}
    between.found[META.type] = between.InTriton()
    try:
        for backend in asked:
            backend.unsupported = lambda recipe, device: None  # type: ignore[assignment]
        yield
    finally:
        del between.found[META.type]
        for backend, unsupported in asked.items():
            backend.unsupported = unsupported  # type: ignore[assignment]


def quantized(linear: nn.Linear, label: str, clock: StepClock) -> QuantLinear:
    """The layer in this format, without values."""
    bits, (outputs, width) = bits_of(label), linear.weight.shape
    assert bits.weight is not None and bits.act is not None and bits.weight.symmetric
    groups = width // (bits.weight.group_size or width)
    codes_OC = torch.empty(outputs, width, dtype=bits.weight.code_dtype, device=META)
    weight = QuantizedWeight(codes_OC, torch.empty(outputs, groups, device=META), None, bits.weight)
    effective = EffectiveLinear(linear.weight, None if linear.bias is None else StepTable.constant(linear.bias))
    return QuantLinear(
        LayerRecipe(Transform(), weight, ActQuant(bits.act)),
        effective,
        folded=False,
        clock=clock,
        dtype=torch.bfloat16,
        device=META,
        backend=BACKENDS[label].NAME,
    ).to(META)


def quantize(block: nn.Module, label: str, *, fused: bool) -> None:
    """In place. fused: with all that a quantized model has around its layers."""
    clock = StepClock(None)  # of all: layers share what they made at the same step of the same clock
    with as_if_on_a_device():
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith(QUANTIZED):
                block.set_submodule(name, quantized(module, label, clock))
        if fused:
            share_inputs(block)
            model = nn.Module()
            model.blocks = nn.ModuleList([block])
            fuse(model, META, torch.bfloat16)


@torch.no_grad()
def count(block: nn.Module, inputs: dict[str, Any]) -> Launches:
    counted = Launches()
    with as_if_on_a_device(), OneKernel(counted), counted:
        block(**inputs)
    return counted


def rows(shapes: dict[str, Shape], tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    designs = [(BF16, BF16), *((label, design) for label in BACKENDS for design in (BEFORE, NOW))]
    for name, shape in shapes.items():
        for label, design in designs:
            with META:
                block = shape.make().to(torch.bfloat16).eval()
            if label != BF16:
                quantize(block, label, fused=design == NOW)
            for number in tokens:
                counted = count(block, shape.inputs(number))
                yield {
                    "block": name,
                    "tokens": number,
                    "format": label,
                    "design": design,
                    "launches": dict(sorted(counted.launches.items())),
                    "bytes": dict(sorted(counted.bytes.items())),
                }


def main() -> None:
    out = Path(sys.argv[1]) if sys.argv[1:] else OUT
    found = {"counted": "on tensors without values; nothing measured", "torch": torch.__version__}
    out.write_text(json.dumps(found | {"rows": list(rows(SHAPES, TOKENS))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
