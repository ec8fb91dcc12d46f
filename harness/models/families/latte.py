"""Latte (Ma et al., arXiv:2401.03048): adaLN-single blocks, in turn over the tokens of a frame and over the frames of a place.

Rows of scale_shift_table as in PixArt, added to `timestep`. The two kinds see one video laid out differently, rows being
frames (B·F) or places (B·T): the state between blocks is kept as (B, F, T, C), and each kind gets its layout.

Departs from diffusers: its pipeline cuts the caption of a lone prompt and zeroes the padding of several, so that a sample drawn
alone differs from the same one drawn in a batch. Here the padding is zeroed in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
from torch import Tensor, nn

from ditbench.harness.models.checkpoint import Checkpoint
from ditbench.harness.models.families.pixart import sites as pixart_sites
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import QKV, reads, table, values
from ditbench.harness.quant.target import Site

TEXT, TIMESTEP = "encoder_hidden_states", "timestep"


def sites(transformer: nn.Module) -> list[Site]:
    """Blocks over frames are PixArt's; those over places have no caption."""
    found = pixart_sites(transformer)
    for index in range(len(transformer.temporal_transformer_blocks)):
        block = f"temporal_transformer_blocks.{index}"
        found += [
            reads("attn_in", block, QKV, table(block, TIMESTEP, 0, 1)),
            reads("attn_out", block, ("attn1.to_out.0",), *values(block, "attn1.to_v")),
            reads("ff_in", block, ("ff.net.0.proj",), table(block, TIMESTEP, 3, 4)),
            reads("ff_mid", block, ("ff.net.2",)),
        ]
    return found


@dataclass(frozen=True)
class FramesAndPlaces:
    """Blocks of both kinds on one state (B, F, T, C). Arguments that were repeated for every frame are kept once."""

    frames: int

    def enter(self, block: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        once = {name: arguments[name][:: self.frames] for name in (TEXT, TIMESTEP)}
        return arguments["hidden_states"].unflatten(0, (-1, self.frames)), once

    def run(self, block: nn.Module, hidden_BFTC: Tensor, arguments: dict[str, Any]) -> Tensor:
        over_frames = block.attn2 is not None
        state = hidden_BFTC if over_frames else hidden_BFTC.transpose(1, 2)
        times, rows = state.shape[1], state.flatten(0, 1)
        timestep = arguments[TIMESTEP].repeat_interleave(times, 0)
        if over_frames:
            text = arguments[TEXT].repeat_interleave(times, 0)
            return block(rows, encoder_hidden_states=text, timestep=timestep).unflatten(0, (-1, times))
        if hasattr(block, "frame_positions"):
            rows = rows + block.frame_positions.to(rows.dtype)
        return block(rows, timestep=timestep).unflatten(0, (-1, times)).transpose(1, 2)


class LattePipeline(diffusers.LattePipeline):
    def mask_text_embeddings(self, emb: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """(B, 1, T, C) and (B, T) → the same shape, and T tokens of the null caption."""
        return emb * mask[:, None, :, None], emb.shape[2]


@dataclass(frozen=True)
class Latte(PipelineFamily):
    def load(self, checkpoint: Checkpoint) -> Any:
        return LattePipeline(**super().load(checkpoint).components)


def stream(transformer: nn.Module) -> FramesAndPlaces:
    """The first block over places carries the positions of frames that the transformer adds before it."""
    first = transformer.temporal_transformer_blocks[0]
    first.register_buffer("frame_positions", transformer.temp_pos_embed, persistent=False)
    return FramesAndPlaces(transformer.config.video_length)


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    frames = pipe.transformer.config.video_length
    return {"height": side, "width": side, "video_length": frames, "clean_caption": False}


FAMILY = Latte(
    pipelines=("LattePipeline",),
    transformer="LatteTransformer3DModel",
    lists=("transformer_blocks", "temporal_transformer_blocks"),
    in_turn=True,
    SAMPLERS=("pipeline", "ddim"),
    stream=stream,
    sites=sites,
    call=call,
)
