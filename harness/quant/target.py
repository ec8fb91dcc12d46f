"""What a method is given: the float transformer, the layers to quantize, and where each layer's input comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

QUANTIZABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class AdaLNRows:
    """The input is LN(x) · (1 + γ) + β; β and γ are these rows of the linear layer `linear`."""

    linear: str
    shift_rows: slice
    scale_rows: slice


@dataclass(frozen=True)
class ValueRows:
    """The input is softmax(q kᵀ) · v, heads side by side; v is the output of `linear`. Softmax rows sum to one."""

    linear: str


@dataclass(frozen=True)
class Site:
    """One tensor that one or several layers read. A transform of it can be folded if `producer` is known."""

    name: str
    consumers: tuple[str, ...]
    producer: AdaLNRows | ValueRows | None = None


@dataclass(frozen=True)
class Target:
    """The float transformer and what the protocol quantizes in it.

    layers: names of the linear (and patch-embedding) layers to quantize, in the order of execution.
    sites: the inputs of these layers; every layer in `layers` is a consumer of exactly one site. A site's consumers
        may include layers that stay in float; they follow its transform as well.
    attention: names of the attention modules whose operands the protocol quantizes.
    blocks: names of the transformer blocks, in the order of execution.
    """

    transformer: nn.Module
    layers: tuple[str, ...]
    sites: tuple[Site, ...]
    attention: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def module(self, name: str) -> nn.Linear | nn.Conv2d:
        layer = self.transformer.get_submodule(name)
        assert isinstance(layer, QUANTIZABLE), f"{name} is a {type(layer).__name__}"
        return layer

    def site_of(self, layer: str) -> Site:
        for site in self.sites:
            if layer in site.consumers:
                return site
        raise KeyError(f"{layer} reads from no known site")

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
