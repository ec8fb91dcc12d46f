"""Hunyuan-DiT (Li et al., arXiv:2405.08748): blocks with long skip connections; norms have weights and modulation only shifts.

What a norm with its own weights gives could take over a scale, but the blocks behind the middle also read the outputs of those
before it, so a state that goes from block to block does not describe them: nothing is folded and block-wise methods are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ditbench.harness.models.checkpoint import Checkpoint
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import QKV, reads
from ditbench.harness.quant.blocks import NotInLine
from ditbench.harness.quant.target import Site


@dataclass(frozen=True)
class HunyuanDiT(PipelineFamily):
    def load(self, checkpoint: Checkpoint) -> Any:
        pipe = super().load(checkpoint)
        pipe.transformer.time_extra_emb.register_forward_pre_hook(in_the_models_dtype, with_kwargs=True)
        return pipe


def in_the_models_dtype(embedder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Diffusers embeds the timestep in the timestep's dtype, which is kept in float32 here."""
    return args, kwargs | {"hidden_dtype": embedder.pooler.positional_embedding.dtype}


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.blocks)):
        block = f"blocks.{index}"
        found += [
            reads("attn_in", block, QKV),
            reads("caption", block, ("attn2.to_k", "attn2.to_v")),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"height": side, "width": side, "use_resolution_binning": False, "original_size": (side, side)}


FAMILY = HunyuanDiT(
    pipelines=("HunyuanDiTPipeline",),
    transformer="HunyuanDiT2DModel",
    lists=("blocks",),
    ALWAYS_FLOAT=r"^time_extra_emb\.pooler\.",  # its attention is one function of their weights
    stream=lambda transformer: NotInLine("its later blocks read the outputs of its first ones (long skips)"),
    sites=sites,
    call=call,
)
