"""The VAE of Open-Sora 1.2, its decoding half: a causal temporal decoder, then Stable Diffusion's image decoder for each frame.

Frames go through in chunks of `micro_frames` (17), each 5 latent frames long; what a chunk has too many, because its frames
are no multiple of 4, is dropped at its front. Modules are named as in the public checkpoint.

Sources: hpcaitech/Open-Sora@2a99b5f (opensora/models/vae/vae.py) and @0860b06 (opensora/models/vae/vae_temporal.py).
Left out: the temporal encoder, which only training and editing need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

SPATIAL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}  # SDXL's, whose weights it has
FRAMES_AT_ONCE = 4  # through the image decoder, for the sake of memory


class OpenSoraVAE(ModelMixin, ConfigMixin):
    """Defaults are the public checkpoint's. spatial: arguments of AutoencoderKL. latent_shift, latent_scale: per channel."""

    @register_to_config
    def __init__(
        self,
        spatial: dict[str, Any] | None = None,
        latent_channels: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_groups: int = 32,
        micro_frames: int = 17,
        scaling_factor: float = 0.18215,
        latent_shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
        latent_scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
    ) -> None:
        super().__init__()
        self.spatial_vae = AutoencoderKL(**SPATIAL | {"latent_channels": latent_channels} | (spatial or {}))
        widths = [filters * each for each in channel_multipliers]
        self.temporal_vae = TemporalVAE(latent_channels, widths, num_res_blocks, temporal_downsample, num_groups)
        self.register_buffer("shift", torch.tensor(latent_shift)[None, :, None, None, None])
        self.register_buffer("scale", torch.tensor(latent_scale)[None, :, None, None, None])
        self.time_factor = 2 ** sum(temporal_downsample)
        self.space_factor = 2 ** (len(self.spatial_vae.config.block_out_channels) - 1)

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, h, w) of the latent of a video with so many frames and pixels."""
        whole, rest = divmod(frames, self.config.micro_frames)
        latent_frames = whole * self._latent_frames(self.config.micro_frames) + self._latent_frames(rest)
        return latent_frames, height // self.space_factor, width // self.space_factor

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """(B, C, F, h, w) → `frames` frames of each video, (B, frames, 3, H, W), about [−1, 1], in the VAE's dtype."""
        latents = latents.to(self.shift) * self.scale + self.shift
        decoded = []
        for chunk in latents.split(self._latent_frames(self.config.micro_frames), dim=2):
            wanted = min(self.config.micro_frames, frames)
            decoded.append(self.temporal_vae(chunk)[:, :, -wanted:])
            frames -= wanted
        images = torch.cat(decoded, 2).transpose(1, 2)
        pixels = [
            self.spatial_vae.decode(part / self.config.scaling_factor).sample
            for part in images.flatten(0, 1).split(FRAMES_AT_ONCE)
        ]
        return torch.cat(pixels).unflatten(0, images.shape[:2])

    def _latent_frames(self, frames: int) -> int:
        return -(-frames // self.time_factor)


class TemporalVAE(nn.Module):
    def __init__(
        self, channels: int, widths: Sequence[int], depth: int, doubled: Sequence[bool], num_groups: int
    ) -> None:
        super().__init__()
        self.post_quant_conv = CausalConv(channels, channels, 1)
        self.decoder = TemporalDecoder(channels, widths, depth, doubled, num_groups)

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class TemporalDecoder(nn.Module):
    """widths, doubled: from the pixels' end, as the checkpoint numbers them; doubled[i]: whether level i has twice the
    frames of level i + 1."""

    def __init__(
        self, channels: int, widths: Sequence[int], depth: int, doubled: Sequence[bool], num_groups: int
    ) -> None:
        super().__init__()
        self.doubled = tuple(doubled)
        self.conv1 = CausalConv(channels, widths[-1], 3)
        self.res_blocks = nn.ModuleList([ResBlock(widths[-1], widths[-1], num_groups) for _ in range(depth)])
        before = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            nn.ModuleList([ResBlock(entry if k == 0 else width, width, num_groups) for k in range(depth)])
            for entry, width in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width, 3) if twice else nn.Identity()
            for width, twice in zip(widths[1:], doubled, strict=True)
        )
        self.norm1 = nn.GroupNorm(num_groups, widths[0])
        self.conv_out = CausalConv(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.doubled[level - 1]:  # every channel holds a frame and the next one, side by side
                    x = x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(num_groups, channels), CausalConv(channels, out, 3, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(num_groups, out), CausalConv(out, out, 3, bias=False)
        if channels != out:
            self.conv3 = CausalConv(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv3(x) if hasattr(self, "conv3") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(x)))


class CausalConv(nn.Module):
    """A frame sees itself and the frames before it; zeros stand for what is outside."""

    def __init__(self, channels: int, out: int, side: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, side, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        ahead = self.conv.kernel_size[0] - 1
        return self.conv(F.pad(x, (ahead // 2,) * 4 + (ahead, 0)))
