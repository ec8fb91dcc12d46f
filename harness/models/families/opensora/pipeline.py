"""Text to video with Open-Sora 1.2: T5, STDiT3, a rectified flow in Euler steps, the VAE. diffusers has no such pipeline.

The flow x_t = (1 − t) x₀ + t · noise is followed from t = 1 at t_i = 1 − i / N, each moved towards noise as the video is larger,

    t' = r t / (1 + (r − 1) t),    r = √(height · width / 512²) · √(latent frames)

which is what FlowMatchEulerDiscreteScheduler does with dynamic shifting and mu = ln r. The model's velocity is x₀ − noise, the
scheduler's noise − x₀. With guidance the unconditional half reads `y_embedding` up to the length of the caption.

Source: hpcaitech/Open-Sora@c552c6a (opensora/schedulers/rf), @3b6d136 (scripts/inference.py). Departs from it: captions are in
lower case, but otherwise as they are (its cleaning drops brackets, links and the like); r counts the frames of the latent, where
the source has ⌊frames / 17⌋ · 5, the same for whole multiples of 17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

BASE_PIXELS = 512 * 512
STILL_FPS = 120.0  # the frame rate that stands for a picture


@dataclass
class OpenSoraOutput(BaseOutput):
    """frames: (B, F, 3, H, W) in [0, 1], or latents (B, C, F, h, w)."""

    frames: Tensor


class OpenSoraPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self, tokenizer: Any, text_encoder: nn.Module, transformer: nn.Module, vae: nn.Module, scheduler: Any
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        height: int = 240,
        width: int = 426,
        num_frames: int = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        generator: list[torch.Generator] | None = None,
        fps: float = 24.0,
        aesthetic_score: float | None = 6.5,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> OpenSoraOutput | tuple[Tensor]:
        """Sizes in pixels and frames. aesthetic_score: said in the caption, as in training; None leaves it out. output_type: "pt" or "latent"."""
        if not self.scheduler.config.use_dynamic_shifting:
            raise ValueError("the scheduler of Open-Sora needs use_dynamic_shifting: true; see its config")
        caption_BLC, mask_BL = self.encode_prompt(prompt, aesthetic_score)
        guided = guidance_scale > 1
        if guided:
            null_BLC = self.transformer.y_embedder.y_embedding.to(caption_BLC).expand_as(caption_BLC)
            caption_BLC, mask_BL = torch.cat([caption_BLC, null_BLC]), mask_BL.repeat(2, 1)

        size = self.vae.latent_size(num_frames, height, width)
        latents = randn_tensor(
            (len(prompt), self.transformer.config.in_channels, *size),
            generator=generator,
            device=self._execution_device,
            dtype=torch.float32,
        )
        shift = math.sqrt(height * width / BASE_PIXELS * size[0])
        sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, mu=math.log(shift), device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            rows = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(
                hidden_states=rows,
                timestep=timestep.expand(len(rows)),
                encoder_hidden_states=caption_BLC,
                encoder_attention_mask=mask_BL,
                fps=fps if num_frames > 1 else STILL_FPS,
                height=height,
                width=width,
                return_dict=False,
            )[0]
            velocity = velocity[:, : latents.shape[1]].to(latents)  # without the variance
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(-velocity, timestep, latents, return_dict=False)[0]

        frames = latents
        if output_type != "latent":
            frames = (self.vae.decode(latents, num_frames).float() / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        return OpenSoraOutput(frames) if return_dict else (frames,)

    def encode_prompt(self, prompt: Sequence[str], aesthetic_score: float | None) -> tuple[Tensor, Tensor]:
        """T5's last states (B, L, C) and which of them are the caption's (B, L)."""
        score = "" if aesthetic_score is None else f" aesthetic score: {aesthetic_score:.1f}."
        tokens = self.tokenizer(
            [f"{each}{score}".lower().strip() for each in prompt],
            max_length=self.transformer.config.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(self._execution_device)
        states_BLC = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states_BLC, tokens.attention_mask
