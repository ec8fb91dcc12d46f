"""LTX-2 (Lightricks, arXiv:2601.03233): a stream of video and a narrower one of sound, adaLN-single blocks over RMS norms.

In a block each stream attends to itself and to its text, then either reads the other, then its feed-forward. Rows of
`scale_shift_table` and `audio_scale_shift_table`: shift, scale, gate of self-attention, then of the feed-forward, added to `temb` and
`temb_audio` (LTX-2.3 has three more, of what asks the text); rows of the tables between the streams: scale, shift of audio-to-video, scale,
shift of video-to-audio. Where attention is gated by head and token (LTX-2.3), nothing folds into its values.

Both streams are quantized; samples are the video. Guidance is plain and the same for both streams, one call a step, as LTX-2's card has it:
spatio-temporal and modality guidance, which diffusers switches on for later checkpoints, are off.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.models.base import Sampler
from ditbench.harness.models.encoded_prompts import KEEPS_PROMPTS
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads, values
from ditbench.harness.quant.blocks import TEXT_TOKENS, Arguments, TwoStreams
from ditbench.harness.quant.target import Site, TableRows

HEIGHT, WIDTH, FRAMES, FRAMES_PER_S, TOKENS = 512, 768, 121, 24.0, 1024
OTHER_GUIDANCE = {
    "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}  # fmt: skip
Rows = tuple[str, str, int, int]  # table, argument that it is added to, and there shift and scale
FROM_AUDIO, FROM_VIDEO = (1, 0), (3, 2)


def sites(transformer: nn.Module) -> list[Site]:
    config, found = transformer.config, []
    for block in (f"transformer_blocks.{index}" for index in range(len(transformer.transformer_blocks))):
        found += [
            *_of_stream(block, "", config.gated_attn, config.cross_attn_mod),
            *_of_stream(block, "audio_", config.audio_gated_attn, config.audio_cross_attn_mod),
            *_between(block, "audio_to_video_attn", config.gated_attn, *_rows(FROM_AUDIO)),
            *_between(block, "video_to_audio_attn", config.audio_gated_attn, *reversed(_rows(FROM_VIDEO))),
        ]
    return found


def _of_stream(block: str, stream: str, gated: bool, asks: bool) -> list[Site]:
    """asks: whether what asks the text is modulated."""

    def rows(shift: int, scale: int) -> TableRows:
        return TableRows(block, f"{stream}scale_shift_table", "temb_audio" if stream else "temb", shift, scale)

    itself, text, ff = f"{stream}attn1", f"{stream}attn2", f"{stream}ff"
    return [
        reads(f"{stream}attn_in", block, (*_asking(itself, gated), f"{itself}.to_k", f"{itself}.to_v"), rows(0, 1)),
        _averaged(f"{stream}attn_out", block, itself, gated),
        reads(f"{stream}cross_query", block, _asking(text, gated), *((rows(6, 7),) if asks else ())),
        reads(f"{stream}caption", block, (f"{text}.to_k", f"{text}.to_v")),
        _averaged(f"{stream}cross_out", block, text, gated),
        reads(f"{stream}ff_in", block, (f"{ff}.net.0.proj",), rows(3, 4)),
        reads(f"{stream}ff_mid", block, (f"{ff}.net.2",)),
    ]


def _between(block: str, attention: str, gated: bool, asking: Rows, asked: Rows) -> list[Site]:
    return [
        reads(f"{attention}.query", block, _asking(attention, gated), TableRows(block, *asking)),
        reads(f"{attention}.asked", block, (f"{attention}.to_k", f"{attention}.to_v"), TableRows(block, *asked)),
        _averaged(f"{attention}.out", block, attention, gated),
    ]


def _rows(place: tuple[int, int]) -> list[Rows]:
    """Of the video and of the sound."""
    return [
        ("video_a2v_cross_attn_scale_shift_table", "temb_ca_scale_shift", *place),
        ("audio_a2v_cross_attn_scale_shift_table", "temb_ca_audio_scale_shift", *place),
    ]


def _asking(attention: str, gated: bool) -> tuple[str, ...]:
    return (f"{attention}.to_q", f"{attention}.to_gate_logits") if gated else (f"{attention}.to_q",)


def _averaged(name: str, block: str, attention: str, gated: bool) -> Site:
    producers = () if gated else values(block, f"{attention}.to_v")
    return reads(name, block, (f"{attention}.to_out.0",), *producers)


class VideoAndSound(TwoStreams):
    """Side by side in pieces of the width that divides both."""

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        video, sound = arguments[self.image], arguments[self.text]
        rest = {name: value for name, value in arguments.items() if name not in (self.image, self.text)}
        state = self._beside(video, sound)
        return state, rest | {TEXT_TOKENS: sound.shape[1] * sound.shape[2] // state.shape[2]}

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        rest = {name: value for name, value in arguments.items() if name != TEXT_TOKENS}
        sound, video = hidden.tensor_split([arguments[TEXT_TOKENS]], 1)
        tables: Any = (block.scale_shift_table, block.audio_scale_shift_table)
        video, sound = (
            part.reshape(len(part), -1, table.shape[-1]) for part, table in zip((video, sound), tables, strict=True)
        )
        return self._beside(*block(**{self.image: video, self.text: sound}, **rest))

    @staticmethod
    def _beside(video: Tensor, sound: Tensor) -> Tensor:
        width = math.gcd(video.shape[-1], sound.shape[-1])
        return torch.cat([part.reshape(len(part), -1, width) for part in (sound, video)], 1)


def call(pipe: Any) -> dict[str, Any]:
    usual = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "frame_rate": FRAMES_PER_S}
    return usual | {"max_sequence_length": min(TOKENS, pipe.tokenizer.model_max_length)}


class LTX2Family(PipelineFamily):
    def prepare(self, pipe: Any) -> None:
        """A prompt is all layers of its encoder side by side, 385 MB of it: encoded when it is asked for, and not kept."""
        setattr(pipe, KEEPS_PROMPTS, False)

    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        later = pipe.transformer.prompt_modulation  # LTX-2.3 and what follows
        return (
            super().settings(pipe, guidance, samples)
            | OTHER_GUIDANCE
            | {"audio_guidance_scale": guidance, "use_cross_timestep": later}
        )

    def _scheduler(self, pipe: Any, sampler: Sampler) -> Any:
        """The pipeline copies it for the sound: without what watches the video's steps."""
        scheduler = super()._scheduler(pipe, sampler)
        kind = type(scheduler)
        copied = {"__deepcopy__": lambda own, memo: kind.from_config(own.config)}
        scheduler.__class__ = type(kind.__name__, (kind,), copied)
        return scheduler


FAMILY = LTX2Family(
    pipelines=("LTX2Pipeline",),
    transformer="LTX2VideoTransformer3DModel",
    FLOAT_IN_BLOCKS=r"norm|to_gate_logits",
    stream=lambda transformer: VideoAndSound(
        outputs=("hidden_states", "audio_hidden_states"), text="audio_hidden_states"
    ),
    sites=sites,
    call=call,
)
