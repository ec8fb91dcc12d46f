"""What a method is given: the float transformer, the layers to quantize, and where each layer's input comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ditbench.harness.common.devices import float64_device
from ditbench.harness.quant.blocks import BlockCall, OneStream
from ditbench.harness.quant.sage import SageRecipe

QUANTIZABLE = (nn.Linear, nn.Conv2d)


def is_linear_map(module: nn.Module) -> bool:
    """A linear layer, or a convolution that is one: of patches that do not overlap, or of single pixels."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.kernel_size == module.stride and not any(module.padding)
    return isinstance(module, nn.Linear)


@dataclass(frozen=True)
class AdaLNRows:
    """The input is norm(x) · (1 + γ) + β; β and γ are these rows of the linear layer `linear` (adaLN-Zero and its kin)."""

    linear: str
    shift_rows: slice
    scale_rows: slice


@dataclass(frozen=True)
class TableRows:
    """The input is norm(x) · (1 + γ) + β with (β, γ, …) = the table of `block` + its argument e (adaLN-single).

    e is shared by all blocks, so what is folded is added to e at the input of this block. e is (…, rows · C) or (…, rows, C).
    """

    block: str
    table: str  # attribute of the block: parameter (rows, C), leading ones allowed; "": the block adds nothing to e (FLUX.2)
    argument: str  # of the block's forward
    shift_row: int
    scale_row: int


@dataclass(frozen=True)
class ValueRows:
    """The input is softmax(q kᵀ) · v, heads side by side; v is the output of `linear`, or of some of its rows where
    one layer makes k and v. Softmax rows sum to one."""

    linear: str
    rows: slice = field(default_factory=lambda: slice(None))


Producer = AdaLNRows | TableRows | ValueRows


@dataclass(frozen=True)
class Site:
    """What one or several layers read, through one transform: one tensor, or parts of one.

    A transform of it can be folded if its producers are known: each makes the input of some of the tokens (in a
    two-stream block, those of the image and those of the text).
    groups: the consumers by the tensor that they read. One group of all is the default; of an attention over image and
        text whose output two layers project, each reads the tokens of one stream. Layers of a group have one Hessian
        and one set of statistics; where the site needs one of all, it is taken over `first_readers`.

    Raises:
        ValueError: groups that are not the consumers, each once.
    """

    name: str
    consumers: tuple[str, ...]
    producers: tuple[Producer, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", (self.consumers,))
        grouped = [name for group in self.groups for name in group]
        if sorted(grouped) != sorted(self.consumers):
            raise ValueError(f"{self.name}: groups must hold each of {list(self.consumers)} once, got {grouped}")

    @property
    def first_readers(self) -> tuple[str, ...]:
        """One layer for each distinct tensor."""
        return tuple(group[0] for group in self.groups)

    def group_of(self, layer: str) -> tuple[str, ...]:
        """The layers that read the tensor of this one, itself among them."""
        return next(group for group in self.groups if layer in group)

    def without(self, names: Collection[str]) -> Site:
        """The same with the other consumers only; at least one must be left."""
        groups = tuple(tuple(name for name in group if name not in names) for group in self.groups)
        consumers = tuple(name for name in self.consumers if name not in names)
        return replace(self, consumers=consumers, groups=tuple(group for group in groups if group))

    @property
    def foldable(self) -> bool:
        return bool(self.producers)

    @property
    def modulated(self) -> bool:
        """Whether the input comes out of a modulated norm."""
        return self.foldable and not any(isinstance(producer, ValueRows) for producer in self.producers)

    def rows_of(self, linear: str) -> list[AdaLNRows | ValueRows]:
        """The producers that are rows of this linear layer."""
        return [p for p in self.producers if isinstance(p, AdaLNRows | ValueRows) and p.linear == linear]


@dataclass(frozen=True)
class Target:
    """The float transformer and what the protocol quantizes in it.

    layers: names of the linear (and patch-embedding) layers to quantize, in the order of execution.
    sites: the inputs of these layers; every layer in `layers` is a consumer of exactly one site. A site's consumers
        may include layers that stay in float; they follow its transform as well. All of them share a transform, but only
        those of one of its `groups` read the same numbers.
    attention: names of the attention modules whose operands methods quantize.
    attention_given: what the protocol itself puts on attention modules, whatever the method; methods see float attention.
    blocks: names of the transformer blocks, in the order of execution; block_call: how one is called.
    device: where the algebra of weights is done, one layer at a time. The transformer itself stays on the CPU, and so do
        statistics, states and recipes; what has a layer's weight in it (`weight`, `effective_linear`) is made on the device.
    """

    transformer: nn.Module
    layers: tuple[str, ...]
    sites: tuple[Site, ...]
    attention: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    block_call: BlockCall = field(default_factory=OneStream)
    device: torch.device = torch.device("cpu")
    attention_given: Mapping[str, SageRecipe] = field(default_factory=dict)

    def on(self, device: torch.device | str) -> Target:
        """The same with its algebra on the device, or on the CPU where the device has no float64."""
        return replace(self, device=float64_device(device))

    def module(self, name: str) -> nn.Linear | nn.Conv2d:
        layer = self.transformer.get_submodule(name)
        assert isinstance(layer, QUANTIZABLE), f"{name} is a {type(layer).__name__}"
        return layer

    def layers_in(self, block: str) -> list[str]:
        """Those of `layers` that stand in this block, in their order."""
        return [name for name in self.layers if name.startswith(f"{block}.")]

    def weight(self, name: str) -> Tensor:
        """The layer's weight (O, C) on `device`, in its own dtype; on the CPU the model's own memory, not to be changed."""
        return weight_matrix(self.module(name)).to(self.device)

    def site_of(self, layer: str) -> Site:
        for site in self.sites:
            if layer in site.consumers:
                return site
        raise KeyError(f"{layer} reads from no known site")

    def without(self, names: Collection[str]) -> Target:
        """The same without layers that no call reaches: they are neither quantized nor observed, and nothing is folded there."""
        if not names:
            return self
        names, sites = set(names), []
        for site in self.sites:
            producers = () if any(getattr(each, "linear", "") in names for each in site.producers) else site.producers
            if not names.issuperset(site.consumers):
                sites.append(replace(site.without(names), producers=producers))
        return replace(self, layers=tuple(name for name in self.layers if name not in names), sites=tuple(sites))

    def linear_sites(self) -> list[Site]:
        """Sites with at least one layer to quantize, all of whose consumers are linear."""
        return [
            site
            for site in self.sites
            if any(name in self.layers for name in site.consumers)
            and all(isinstance(self.module(name), nn.Linear) for name in site.consumers)
        ]


def weight_matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight as (O, C): a patch embedding is a linear layer on flattened patches."""
    return layer.weight.detach().flatten(1)
