"""What the harness asks of a model family, and what it sees of a model.

Everything particular to a family (pipeline class, blocks, where a transform can be folded, sampling loop, decoding) is in
its adapter, `harness/models/<family>.py`, found by file name. The rest of the harness sees `LoadedModel` only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditbench.harness.common.devices import CPU
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, tensors_sha256
from ditbench.harness.models.attention_modules import attention_modules
from ditbench.harness.models.calls import RowDims
from ditbench.harness.models.checkpoint import Checkpoint
from ditbench.harness.models.layers import as_run
from ditbench.harness.models.lora import loras
from ditbench.harness.models.macs import count_macs
from ditbench.harness.models.stress import inject_outliers
from ditbench.harness.quant.blocks import BlockCall
from ditbench.harness.quant.experts import Experts, experts_of
from ditbench.harness.quant.layer_names import carries_adapters, linear_names
from ditbench.harness.quant.sage import FORMS
from ditbench.harness.quant.target import Site, Target, is_linear_map
from ditbench.harness.samples.conditions import Conditions

OnCall = Callable[[int, dict[str, Any]], None]  # step, arguments of the transformer's call


@dataclass(frozen=True)
class Correction:
    """What a method may change in the sampler's step (PTQD).

    noise(step, guided estimate) → the estimate that is used.
    variance(step, σ² that an ancestral sampler adds, the estimate's weight in its mean) → the σ² that is used.
    """

    noise: Callable[[int, Tensor], Tensor] | None = None
    variance: Callable[[int, Tensor, Tensor], Tensor] | None = None


RESCALED, TRAINED = (
    "rescaled",
    "trained",
)  # by model.stress, which per-channel scaling undoes; by training, which it does not
OUTLIERS = (RESCALED, TRAINED)


@dataclass(frozen=True)
class ModelSpec:
    """One file of conf/model/.

    source: "zoo:<name>" (shipped), a local pipeline folder, a .safetensors file, or a hub id "<owner>/<name>" with `revision`.
    variant: of the weight files, such as fp16. config: of a source that is one file, the pipeline that it belongs to.
    transformer: a folder, .safetensors file or hub id in place of the pipeline's transformer.
    lora: adapters that are fused into the weights: a path, {path, scale, weight_name}, or a list of these.
    fuse_qkv: q, k and v become one layer wherever diffusers can fuse them.
    random: instead of source, arguments of the family's transformer class; weights are drawn with `seed`.
    size: height, width, num_frames of what is drawn, where it is not the family's usual.
    stress: {channels, log2_factor, seed}: function-preserving rescaling that gives the activations outliers. A scale per channel
        undoes it exactly.
    outliers: {kind, unstressed} of a model that was given outliers: kind is one of OUTLIERS; unstressed names its twin without them.
        It changes nothing, and reports say it.
    """

    name: str
    family: str
    source: str | None = None
    revision: str | None = None
    random: dict[str, Any] | None = None
    seed: int = 0
    dtype: str = "float32"
    size: dict[str, int] | None = None
    stress: dict[str, Any] | None = None
    outliers: dict[str, str] | None = None
    note: str = ""
    variant: str | None = None
    config: str | None = None
    transformer: str | None = None
    lora: str | list[Any] | dict[str, Any] | None = None
    fuse_qkv: bool = False


@dataclass(frozen=True)
class Sampler:
    """How images are drawn: the same for every method of one protocol."""

    kind: str  # one of the family's SAMPLERS
    steps: int
    guidance: float
    guidance_2: float | None = None  # of the second of two experts (Wan 2.2); None: the same
    negative_prompt: str | None = None  # what guidance leads away from; None: the family's own

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"protocol.steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Drawn:
    """latents: (B, …) float32; pixels in [−1, 1], (B, 3, H, W) or (B, F, 3, H, W), float32, or None if not asked for.

    Both on the device of the transformer that drew them.
    """

    latents: Tensor
    pixels: Tensor | None


class Adapter(Protocol):
    """One model family: module-level names of harness/models/<family>.py, or those of its FAMILY object."""

    FLOAT_IN_BLOCKS: str  # regex: linears inside the blocks that the default protocol leaves in float
    ALWAYS_FLOAT: (
        str  # regex: linears that no protocol quantizes, since the model reads their weight instead of calling them
    )
    SAMPLERS: tuple[str, ...]
    CONDITION: str  # LABELS | PROMPTS
    ROWS: RowDims  # where an argument of the transformer has its rows, if that cannot be inferred (`row_dims`)

    def load(self, checkpoint: Checkpoint) -> Any: ...

    def random_pipeline(self, arguments: dict[str, Any], dtype: torch.dtype) -> Any: ...

    def blocks(self, transformer: nn.Module) -> list[str]: ...

    def block_call(self, transformer: nn.Module) -> BlockCall: ...

    def sites(self, transformer: nn.Module) -> list[Site]: ...

    def attention(self, transformer: nn.Module) -> list[str]: ...

    def num_classes(self, transformer: nn.Module) -> int: ...

    def sample(
        self,
        pipe: Any,
        transformer: nn.Module,
        conditions: Conditions,
        sampler: Sampler,
        *,
        on_call: OnCall | None = None,
        correct: Correction | None = None,
        decode: bool = True,
    ) -> Drawn: ...

    def step_inputs(self, pipe: Any, batch: int, device: torch.device) -> dict[str, Any]: ...


def fingerprint_of(spec: ModelSpec, parts: Mapping[str, str]) -> str:
    """Of a model's parts (`models/identity.py`) and of what its settings make of them."""
    settings = {name: getattr(spec, name) for name in ("family", "dtype", "size", "stress", "fuse_qkv")}
    settings["lora_scales"] = [lora.scale for lora in loras(spec.lora)]
    return canonical_sha256({"settings": settings, "parts": dict(parts)})


@dataclass
class LoadedModel:
    """A pipeline in float, its adapter, and hashes of what it was loaded from.

    parts: hash of the files of each part, or of what random weights are drawn from (`models/identity.py`).
    """

    spec: ModelSpec
    pipe: Any
    adapter: Adapter
    extras: dict[str, Path] = field(default_factory=dict)  # files beside the weights: the judge's folder
    parts: dict[str, str] = field(default_factory=dict)
    _macs: dict[str, int] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that was loaded, and of the settings by which; nothing else. Of a pipeline that was made in
        memory, of its weights.
        """
        if self.parts:
            return fingerprint_of(self.spec, self.parts)
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return tensors_sha256(
            {f"{name}.{n}": t for name, part in modules.items() for n, t in part.state_dict().items()}
        )

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of one call on one row, by layer name, "" for the whole call (see `count_macs`); of experts by
        noise level, of one call of each,
        which the expert's name has in all.
        """
        return self.macs_on(CPU)

    def macs_on(self, device: torch.device) -> dict[str, int]:
        """The same. device: where text encoders run for it; counted once, whatever the device."""
        if self._macs is None:
            self._macs = self._counted(self.step_inputs(1, device))
        return self._macs

    def _counted(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Of experts by noise level, one call of each."""
        found = {name: count_macs(each, inputs) for name, each in experts_of(self.transformer).items()}
        if not isinstance(self.transformer, Experts):
            return found[""]
        macs = {f"{name}.{layer}": count for name, each in found.items() for layer, count in each.items() if layer}
        whole = {name: each[""] for name, each in found.items()}
        return macs | whole | {"": sum(whole.values())}

    def step_inputs(self, batch: int, device: torch.device = CPU) -> dict[str, Any]:
        """Arguments of one transformer call on `batch` rows; one denoising step with guidance has twice the samples.

        device: where text encoders run for it.
        """
        return self.adapter.step_inputs(self.pipe, batch, device)

    def inject_outliers(self, channels: int, log2_factor: int, seed: int) -> None:
        """Give the activations outlier channels, in place; the output stays as it is (`harness.models.stress`)."""
        inject_outliers(self.transformer, self.sites(), channels, log2_factor, seed)

    def sites(self) -> list[Site]:
        """The family's, by the layers that run."""
        return as_run(self.transformer, self.adapter.sites(self.transformer))

    def target(self, scope: str = "blocks", skip: Iterable[str] = (), attention: bool | str = False) -> Target:
        """What a protocol quantizes.

        scope: "blocks" (linears inside the blocks, without embedders and adaLN) or "all" (every Linear and Conv2d but the
            family's `ALWAYS_FLOAT`).
        skip: regular expressions of layer names to leave in float.
        attention: whether methods quantize its operands, or one of `quant.sage.FORMS`, which all methods get.
        """
        if scope not in ("blocks", "all"):
            raise UserError(f"protocol.scope={scope!r}; expected blocks or all")
        blocks = tuple(self.adapter.blocks(self.transformer))
        in_float = re.compile(self.adapter.FLOAT_IN_BLOCKS or "(?!)")
        read = re.compile(self.adapter.ALWAYS_FLOAT or "(?!)")
        if carries_adapters(self.transformer):
            raise UserError(
                f"model {self.spec.name}: its transformer carries LoRA adapters, of which a half would be quantized; fuse and "
                "unload them first (pipe.fuse_lora(), pipe.unload_lora_weights()), or set model.lora"
            )
        names = [n for n in linear_names(self.transformer) if is_linear_map(self.transformer.get_submodule(n))]
        experts = [f"{name}." for name in experts_of(self.transformer) if name]

        def within_expert(name: str) -> str:
            return next((name.removeprefix(expert) for expert in experts if name.startswith(expert)), name)

        names = [n for n in names if not read.search(within_expert(n))]
        if scope == "blocks":
            places = [(n, next((f"{b}." for b in blocks if n.startswith(f"{b}.")), None)) for n in names]
            names = [n for n, block in places if block and not in_float.search(n.removeprefix(block))]
        patterns = [re.compile(pattern) for pattern in skip]
        names = [n for n in names if not any(pattern.search(n) for pattern in patterns)]
        if not names:
            raise UserError(
                f"model {self.spec.name}: protocol.scope={scope} and protocol.skip leave no layer to quantize"
            )
        sites = self.sites()
        known = {consumer for site in sites for consumer in site.consumers}
        sites += [Site(name, (name,)) for name in names if name not in known]
        operands = self._attention(scope, blocks, skip, attention) if attention else ()
        return Target(
            self.transformer,
            tuple(names),
            tuple(sites),
            operands if attention is True else (),
            blocks,
            self.adapter.block_call(self.transformer),
            attention_given=dict.fromkeys(operands, FORMS[attention]) if isinstance(attention, str) else {},
        )

    def _attention(
        self, scope: str, blocks: tuple[str, ...], skip: Iterable[str], attention: bool | str
    ) -> tuple[str, ...]:
        """Names of the modules whose operands are quantized. A family may say which `attention=true` means; a form means all.

        Raises:
            UserError: there is none.
        """
        told = self.adapter.attention(self.transformer)
        found = attention_modules(
            self.transformer,
            blocks=blocks if scope == "blocks" else None,
            told=told,
            linear=getattr(self.adapter, "LINEAR_ATTENTION", ""),
            skip=skip,
        )
        names = tuple(told) if attention is True and told else tuple(found)
        if not names:
            raise UserError(
                f"model {self.spec.name}: family {self.spec.family} has no softmax attention that protocol.scope={scope} and "
                "protocol.skip leave to quantize; set protocol.attention=false"
            )
        return names
