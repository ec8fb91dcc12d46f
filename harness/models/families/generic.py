"""Any diffusers pipeline with a `transformer` and prompts: every transform online, no method that works block by block.

Blocks are the members of the transformer's lists of modules that have more than one linear layer, in the order in which they
were made; norms and modulation stay in float. Guidance is the pipeline's `guidance_scale`, or `true_cfg_scale` where only that
one guides (Qwen-Image). Set `model.size` where the pipeline's own height, width or num_frames is not wanted. A family of its
own folds and streams. What runs and what does not: docs/models.md.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.checkpoint import AnotherFamily, Checkpoint
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.quant.blocks import NotInLine
from ditbench.harness.quant.target import is_linear_map

GUIDANCE = ("guidance_scale", "true_cfg_scale")
NO_CONCEPT = " "  # the negative prompt of true guidance, as Qwen-Image's authors use it
ONLY_TILED = ("AutoencoderKLAllegro",)  # VAEs that decode tiles and no whole video


@dataclass(frozen=True)
class GenericFamily(PipelineFamily):
    def load(self, checkpoint: Checkpoint) -> Any:
        pipe = super().load(checkpoint)
        if type(getattr(pipe, "vae", None)).__name__ in ONLY_TILED:
            self._tile(pipe.vae)
        return pipe

    def _tile(self, vae: nn.Module) -> None:
        """Raise UserError for videos smaller than a tile, which would come out grey."""
        vae.enable_tiling()
        vae.enable_slicing()  # its tiles are of one video
        least = dict(zip(("num_frames", "height", "width"), vae.kernel, strict=True))
        small = [f"{name}={self.size[name]}" for name in least if self.size.get(name, least[name]) < least[name]]
        if small:
            raise UserError(
                f"a {type(vae).__name__} decodes in tiles of {least['num_frames']} frames of {least['height']}×{least['width']}; "
                f"model.size has {' and '.join(small)}, of which it would decode nothing"
            )

    def _check(self, pipe: Any) -> None:
        if not isinstance(getattr(pipe, "transformer", None), nn.Module):
            raise AnotherFamily(f"a {type(pipe).__name__} without a transformer")

    def _blocks(self, transformer: nn.Module) -> list[str]:
        lists = [(name, child) for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)]
        return [f"{name}.{index}" for name, child in lists for index, each in enumerate(child) if is_block(each)]

    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        """Of the arguments that could be its guidance, the one that guides unless it is told otherwise."""
        known = inspect.signature(pipe.__call__).parameters
        name = next((each for each in GUIDANCE if each in known and (known[each].default or 0) > 1), None)
        if name is None and guidance > 1:
            raise UserError(
                f"a {type(pipe).__name__} takes its guidance neither as {' nor as '.join(GUIDANCE)}; set protocol.guidance=1"
            )
        guided: dict[str, Any] = {} if name is None else {name: guidance}
        if name == "true_cfg_scale" and guidance > 1:
            guided["negative_prompt"] = [NO_CONCEPT] * samples
        plain = {"clean_caption": False} if "clean_caption" in known else {}  # it cleans if certain libraries are there
        return guided | plain | self.call(pipe) | self.size


def is_block(module: nn.Module) -> bool:
    return sum(is_linear_map(each) for each in module.modules()) > 1


FAMILY = GenericFamily(
    pipelines=(),
    transformer="transformer",
    FLOAT_IN_BLOCKS=r"(?i)norm|adaln|modulation|(img|txt)_mod\b",
    ALWAYS_FLOAT=r"\b(time|delta)_embedder\.",  # Wan's kin take their dtype from the weights
    unguided=0.0,  # Z-Image guides at every scale above 0
    stream=lambda transformer: NotInLine("the generic family does not know how its blocks are called"),
)
