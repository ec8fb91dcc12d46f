"""STDiT3, the transformer of Open-Sora 1.2 (Zheng et al., arXiv:2412.20404): attention within a frame and across frames in turn.

A video latent (B, O, F, h, w) becomes patches, padded with zeros where its size asks for it: F frames of P places each,
one state x of (B, F·P, C). With e = t_block(t) and t = embed(timestep) + embed(fps), both kinds of block compute

    β₁, γ₁, α₁, β₂, γ₂, α₂ = scale_shift_table + e
    x ← x + α₁ · attn(norm(x) · (1 + γ₁) + β₁)       spatial: among the P places of a frame; temporal: among the F frames of a place
    x ← x + cross_attn(x, caption)
    x ← x + α₂ · mlp(norm(x) · (1 + γ₂) + β₂)

q and k pass an RMSNorm per head, then, in temporal blocks only, a rotation by the frame's number. Places enter once, as sines
and cosines of their column and row added to the patches. Modules are named as in the public checkpoint, and so are the
arguments of its config.json that matter here.

Sources: hpcaitech/Open-Sora@3552145 (opensora/models/stdit/stdit3.py) and @eb0ba30 (opensora/models/layers/blocks.py) for names,
shapes and the order of operations. Left out: frames that are given rather than drawn (`x_mask`), training, sequence parallelism.
Departs from it: timesteps and rotation angles are computed in float32 or better; it rounds both to the model's dtype.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256  # of a timestep's or a frame rate's embedding
LONGEST_PERIOD = 10000.0
EPS = 1e-6


class STDiT3(ModelMixin, ConfigMixin):
    """Defaults are the public checkpoint's. input_sq_size: side in pixels of the square whose places are 1 apart."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        pred_sigma: bool = True,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ) -> None:
        super().__init__()
        width, self.out_channels = hidden_size, in_channels * (2 if pred_sigma else 1)
        self.x_embedder = PatchEmbedding(in_channels, width, tuple(patch_size))
        self.t_embedder, self.fps_embedder = ScalarEmbedding(width), ScalarEmbedding(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedding(caption_channels, width, model_max_length)
        block = (width, num_heads, int(width * mlp_ratio))
        self.spatial_blocks = nn.ModuleList([Block(*block, temporal=False) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([Block(*block, temporal=True) for _ in range(depth)])
        self.final_layer = FinalLayer(width, math.prod(patch_size) * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        fps: float,
        height: int,
        width: int,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity x₀ − noise, with `pred_sigma` followed by as many channels that no sampler reads.

        hidden_states: (B, in_channels, F, h, w). timestep: (B,), 0–1000, noise at 1000. encoder_hidden_states:
        (B, L, caption_channels). encoder_attention_mask: (B, L), nonzero where a token may be read. fps: frames per
        second. height, width: of the video in pixels.
        """
        size, patch = hidden_states.shape[-3:], self.config.patch_size
        x = self.x_embedder(hidden_states)
        frames, rows, columns = x.shape[-3:]
        scale = math.sqrt(height * width) / self.config.input_sq_size
        places_PC = place_embedding(x.shape[1], rows, columns, scale, x.device).to(x.dtype)
        x_BTC = (x.flatten(3).permute(0, 2, 3, 1) + places_PC).flatten(1, 2)

        temb_BC = self.t_embedder(timestep, x.dtype) + self.fps_embedder(torch.full_like(timestep, fps), x.dtype)
        e_BRC = self.t_block(temb_BC).unflatten(-1, (6, -1))
        caption_BLC = self.y_embedder.y_proj(encoder_hidden_states)
        readable = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                x_BTC = block(x_BTC, e_BRC, caption_BLC, readable, frames)

        patches = self.final_layer(x_BTC, temb_BC).unflatten(-1, (*patch, self.out_channels))
        video = patches.unflatten(1, (frames, rows, columns)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        video = video.flatten(6, 7).flatten(4, 5).flatten(2, 3)[..., : size[0], : size[1], : size[2]]
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, heads, rotary=temporal)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.mlp = MLP(width, hidden, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, hidden_BTC: Tensor, e: Tensor, caption_BLC: Tensor, readable: Tensor | None, frames: int
    ) -> Tensor:
        """hidden_BTC: T = frames · places. e: (B, 6, C). readable: bool (B, 1, 1, L), or None."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.scale_shift_table + e).unsqueeze(2).unbind(1)
        read = self.norm1(hidden_BTC) * (1 + scale_1) + shift_1
        hidden_BTC = hidden_BTC + gate_1 * self._attend(read.unflatten(1, (frames, -1))).flatten(1, 2)
        hidden_BTC = hidden_BTC + self.cross_attn(hidden_BTC, caption_BLC, readable)
        return hidden_BTC + gate_2 * self.mlp(self.norm2(hidden_BTC) * (1 + scale_2) + shift_2)

    def _attend(self, x_BFPC: Tensor) -> Tensor:
        by_row = x_BFPC.transpose(1, 2) if self.temporal else x_BFPC
        mixed = self.attn(by_row.flatten(0, 1)).unflatten(0, by_row.shape[:2])
        return mixed.transpose(1, 2) if self.temporal else mixed


class SelfAttention(nn.Module):
    """Rows of `qkv`: q, k, v, each with its heads side by side. rotary: token n is turned by n."""

    def __init__(self, width: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, EPS) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        query, key, value = self.qkv(x_BTC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary:
            query, key = rotated(query), rotated(key)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Rows of `kv_linear`: k, then v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor, caption_BLC: Tensor, readable: Tensor | None) -> Tensor:
        query = self.q_linear(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(caption_BLC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=readable)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbedding(nn.Module):
    """(B, in, F, h, w) → (B, width, frames, rows, columns), zeros added behind what does not fill a patch."""

    def __init__(self, channels: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = (-size % side for size, side in zip(x.shape[-3:], self.proj.stride, strict=True))
        return self.proj(F.pad(x, (0, width, 0, height, 0, frames)))


class ScalarEmbedding(nn.Module):
    """One number per sample, as cosines and sines of it, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value_B: Tensor, dtype: torch.dtype) -> Tensor:
        waves = get_timestep_embedding(value_B, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(dtype))


class CaptionEmbedding(nn.Module):
    """y_embedding: what stands for the caption in the unconditional half of guidance."""

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = MLP(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x_BTC: Tensor, temb_BC: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + temb_BC[:, None]).unsqueeze(2).unbind(1)
        return self.linear(self.norm_final(x_BTC) * (1 + scale) + shift)


def place_embedding(channels: int, rows: int, columns: int, scale: float, device: torch.device | str = "cpu") -> Tensor:
    """(rows · columns, channels), float64: sines and cosines of a place's column, then those of its row.

    Both run over the same length √(rows · columns) / scale, whatever the picture's shape; scale is the picture's side
    over the one that the model was first trained at.
    """
    frequencies = inverse_frequencies(channels // 2, device)
    length = round(math.sqrt(rows * columns)) / scale

    def encoded(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64, device=device) * (length / count)
        angles = torch.outer(places, frequencies)
        return torch.cat([angles.sin(), angles.cos()], -1)

    by_column = encoded(columns).expand(rows, -1, -1)
    by_row = encoded(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], -1).flatten(0, 1)


def rotated(x: Tensor) -> Tensor:
    """(…, T, D): channels 2i and 2i + 1 of token n as a point in the plane, turned by n · 10000^(−2i / D)."""
    places = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device)
    angles = torch.outer(places, inverse_frequencies(x.shape[-1], x.device))
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def inverse_frequencies(channels: int, device: torch.device | str) -> Tensor:
    """10000^(−2i / channels), (channels / 2,), float64."""
    return LONGEST_PERIOD ** -(torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
