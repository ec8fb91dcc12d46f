"""Any diffusers pipeline with a `transformer` and prompts: every transform online, no method that works block by block.

Blocks are the members of the transformer's lists of modules, in the order in which they were made; norms stay in float. Set
`model.size` where the pipeline's own height, width or num_frames is not wanted. A family of its own folds and streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.quant.blocks import NotInLine


@dataclass(frozen=True)
class GenericFamily(PipelineFamily):
    def _check(self, pipe: Any) -> None:
        if not isinstance(getattr(pipe, "transformer", None), nn.Module):
            raise TypeError(f"a {type(pipe).__name__} without a transformer")

    def blocks(self, transformer: nn.Module) -> list[str]:
        lists = [name for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)]
        return [f"{name}.{index}" for name in lists for index in range(len(transformer.get_submodule(name)))]


FAMILY = GenericFamily(
    pipelines=(),
    transformer="transformer",
    stream=lambda transformer: NotInLine("the generic family does not know how its blocks are called"),
)
