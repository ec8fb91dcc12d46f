"""HunyuanVideo-1.5 (Tencent, arXiv:2511.18870): MMDiT double blocks over video and text, each with its own adaLN-Zero rows.

Chunks of `norm1.linear` (video) and `norm1_context.linear` (text): shift, scale, gate of attention and of the feed-forward. Text is
what Qwen2.5-VL, ByT5 and SigLIP make of it, 1,985 tokens of which most are padding; padding attends to nothing and nobody to it, so
that what folds into V is exact where somebody looks. Guidance is a part of the pipeline (`guider`) and no argument of its call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ditbench.harness.models.families.flux import double_sites
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 480, 848, 121


def sites(transformer: nn.Module) -> list[Site]:
    """The blocks are laid out as FLUX.1's double ones."""
    return double_sites(transformer)


def call(pipe: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


def in_the_weights_dtype(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The class embeds a timestep in the timestep's dtype, which here is float32 whatever the model's."""
    return (args[0].to(module.linear_1.weight.dtype),)  # type: ignore[union-attr,arg-type]


class HunyuanVideo15Family(PipelineFamily):
    def prepare(self, pipe: Any) -> None:
        pipe.transformer.time_embed.timestep_embedder.register_forward_pre_hook(in_the_weights_dtype)
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.enable_slicing()  # its attention takes one video

    def parts(self, pipe: Any, guidance: float) -> dict[str, Any]:
        return {"guider": pipe.guider.new(guidance_scale=guidance)}

    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        return self.call(pipe) | self.size


FAMILY = HunyuanVideo15Family(
    pipelines=("HunyuanVideo15Pipeline",),
    transformer="HunyuanVideo15Transformer3DModel",
    stream=lambda transformer: TwoStreams(outputs=("hidden_states", "encoder_hidden_states")),
    sites=sites,
    call=call,
)
