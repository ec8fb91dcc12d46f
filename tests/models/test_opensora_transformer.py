"""STDiT3 against its equations and the public checkpoint's names."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_2d_sincos_pos_embed
from small_pipelines import SMALL_STDIT3, SMALL_TEXT, lively
from torch import Tensor
from torch.nn import functional as F

from ditbench.harness.models.families.opensora.stdit3 import Block, STDiT3, place_embedding, rotated

C, HEADS, FRAMES, PLACES, L = 16, 2, 3, 4, 5
BLOCK = {
    "scale_shift_table": (6, 1152),
    "attn.qkv.weight": (3456, 1152),
    "attn.qkv.bias": (3456,),
    "attn.q_norm.weight": (72,),
    "attn.k_norm.weight": (72,),
    "attn.proj.weight": (1152, 1152),
    "attn.proj.bias": (1152,),
    "cross_attn.q_linear.weight": (1152, 1152),
    "cross_attn.q_linear.bias": (1152,),
    "cross_attn.kv_linear.weight": (2304, 1152),
    "cross_attn.kv_linear.bias": (2304,),
    "cross_attn.proj.weight": (1152, 1152),
    "cross_attn.proj.bias": (1152,),
    "mlp.fc1.weight": (4608, 1152),
    "mlp.fc1.bias": (4608,),
    "mlp.fc2.weight": (1152, 4608),
    "mlp.fc2.bias": (1152,),
}
PUBLIC = {
    "x_embedder.proj.weight": (1152, 4, 1, 2, 2),
    "x_embedder.proj.bias": (1152,),
    "t_embedder.mlp.0.weight": (1152, 256),
    "t_embedder.mlp.0.bias": (1152,),
    "t_embedder.mlp.2.weight": (1152, 1152),
    "t_embedder.mlp.2.bias": (1152,),
    "fps_embedder.mlp.0.weight": (1152, 256),
    "fps_embedder.mlp.0.bias": (1152,),
    "fps_embedder.mlp.2.weight": (1152, 1152),
    "fps_embedder.mlp.2.bias": (1152,),
    "t_block.1.weight": (6912, 1152),
    "t_block.1.bias": (6912,),
    "y_embedder.y_embedding": (300, 4096),
    "y_embedder.y_proj.fc1.weight": (1152, 4096),
    "y_embedder.y_proj.fc1.bias": (1152,),
    "y_embedder.y_proj.fc2.weight": (1152, 1152),
    "y_embedder.y_proj.fc2.bias": (1152,),
    "final_layer.scale_shift_table": (2, 1152),
    "final_layer.linear.weight": (32, 1152),
    "final_layer.linear.bias": (32,),
    **{f"{kind}_blocks.{n}.{k}": v for kind in ("spatial", "temporal") for n in range(28) for k, v in BLOCK.items()},
}


@pytest.fixture(scope="module")
def public_model() -> STDiT3:
    with torch.device("meta"):
        return STDiT3()


@pytest.fixture(scope="module")
def small() -> STDiT3:
    return lively(STDiT3(**SMALL_STDIT3)).double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_names_and_shapes_are_those_of_the_public_checkpoint(public_model):
    """But for rope.freqs, a constant."""
    assert {name: tuple(tensor.shape) for name, tensor in public_model.state_dict().items()} == PUBLIC


def test_the_public_size_has_the_parameters_that_its_authors_count(public_model):
    """1.12 · 2³⁰: they divide by powers of 1024 (hpcaitech/Open-Sora issue 832)."""
    assert sum(p.numel() for p in public_model.parameters()) / 2**30 == pytest.approx(1.12, abs=0.01)


# The equations, slowly.


def slow_attention(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """One head: Σ_j softmax_j(q_i · k_j / √D) v_j."""
    mixed = []
    for query in queries:
        scores = torch.stack([query @ key / math.sqrt(len(key)) for key in keys])
        weights = scores.exp() / scores.exp().sum()
        mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return mixed


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, n: int) -> Tensor:
    """Pairs of neighbours as complex numbers, times e^{i n θ}."""
    angles = [n / 10000 ** (2 * i / len(x)) for i in range(len(x) // 2)]
    turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten()


def normed(x: Tensor) -> Tensor:
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-6).sqrt()


def slow_block(p: dict[str, Tensor], x: Tensor, e: Tensor, caption: Tensor, places: int, temporal: bool) -> Tensor:
    """x (T, C) of one sample, e (6, C), caption (L, C): only what may be read."""

    def linear(name: str, v: Tensor) -> Tensor:
        return p[f"{name}.weight"] @ v + p[f"{name}.bias"]

    beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = p["scale_shift_table"] + e
    head = len(beta_1) // HEADS
    heads = [slice(h * head, (h + 1) * head) for h in range(HEADS)]
    parts = [linear("attn.qkv", normed(row) * (1 + gamma_1) + beta_1).split(len(beta_1)) for row in x]
    attended = torch.zeros_like(x)
    for group in range(places if temporal else len(x) // places):
        step, first = (places, group) if temporal else (1, group * places)
        tokens = list(range(first, len(x), step)) if temporal else list(range(first, first + places))
        for h in heads:
            queries = [rms(parts[t][0][h], p["attn.q_norm.weight"]) for t in tokens]
            keys = [rms(parts[t][1][h], p["attn.k_norm.weight"]) for t in tokens]
            if temporal:
                queries, keys = ([turned(v, n) for n, v in enumerate(each)] for each in (queries, keys))
            for t, mixed in zip(tokens, slow_attention(queries, keys, [parts[t][2][h] for t in tokens]), strict=True):
                attended[t, h] = mixed
    out = []
    for t, row in enumerate(x):
        row = row + alpha_1 * linear("attn.proj", attended[t])
        query = linear("cross_attn.q_linear", row)
        pairs = [linear("cross_attn.kv_linear", token).split(len(row)) for token in caption]
        read = torch.cat(
            [slow_attention([query[h]], [k[h] for k, _ in pairs], [v[h] for _, v in pairs])[0] for h in heads]
        )
        row = row + linear("cross_attn.proj", read)
        hidden = F.gelu(linear("mlp.fc1", normed(row) * (1 + gamma_2) + beta_2), approximate="tanh")
        out.append(row + alpha_2 * linear("mlp.fc2", hidden))
    return torch.stack(out)


@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_a_block_is_its_equations(temporal):
    block = lively(Block(C, HEADS, 2 * C, temporal=temporal)).double()
    x, e, caption = normal(2, FRAMES * PLACES, C), normal(2, 6, C, seed=1), normal(2, L, C, seed=2)
    lengths = (2, L)
    readable = (torch.arange(L) < torch.tensor(lengths)[:, None])[:, None, None]
    with torch.no_grad():
        found = block(x, e, caption, readable, FRAMES)
        weights = dict(block.state_dict())
        for b, length in enumerate(lengths):
            expected = slow_block(weights, x[b], e[b], caption[b, :length], PLACES, temporal)
            torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_a_token_reaches_its_frame_in_spatial_blocks_and_its_place_in_temporal_ones(temporal):
    block = lively(Block(C, HEADS, 2 * C, temporal=temporal)).double()
    x, e, caption = normal(1, FRAMES * PLACES, C), normal(1, 6, C, seed=1), normal(1, L, C, seed=2)
    other = x.clone()
    frame, place = 1, 2
    other[0, frame * PLACES + place] = normal(C, seed=3)
    with torch.no_grad():
        moved = (block(x, e, caption, None, FRAMES) - block(other, e, caption, None, FRAMES)).abs().amax(-1)
    reached = (moved[0] > 1e-6).unflatten(0, (FRAMES, PLACES))
    expected = torch.zeros(FRAMES, PLACES, dtype=torch.bool)
    expected[(slice(None), place) if temporal else (frame, slice(None))] = True
    assert torch.equal(reached, expected)


def test_the_rotation_is_diffusers_own():
    x = normal(2, HEADS, 7, 8)
    table = get_1d_rotary_pos_embed(8, 7, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    expected = apply_rotary_emb(x, table, use_real=True, use_real_unbind_dim=-1)
    torch.testing.assert_close(rotated(x), expected, rtol=0, atol=1e-5)


def test_places_are_encoded_as_in_diffusers():
    rows, columns, scale = 3, 5, 0.62
    expected = get_2d_sincos_pos_embed(
        16, (rows, columns), interpolation_scale=scale, base_size=round(math.sqrt(rows * columns)), output_type="pt"
    )
    torch.testing.assert_close(place_embedding(16, rows, columns, scale).float(), expected.float(), rtol=0, atol=1e-5)


def test_the_model_is_its_equations(small):
    """Patches with an odd edge, places, two embedded numbers, both kinds of block in turn, the learned variance behind."""
    p, (height, width), fps = dict(small.state_dict()), (16, 10), 24.0
    frames, h, w = 2, 4, 5
    rows, columns = 2, 3
    video, caption = normal(1, 4, frames, h, w), normal(1, 12, SMALL_TEXT, seed=1)
    mask = (torch.arange(12) < 7)[None].long()
    with torch.no_grad():
        found = small(video, torch.tensor([321.5]), caption, mask, fps=fps, height=height, width=width).sample[0]

    padded = F.pad(video[0], (0, 1))
    places = place_embedding(C, rows, columns, math.sqrt(height * width) / 16)
    x = []
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = padded[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
                weight = p["x_embedder.proj.weight"][:, :, 0]
                x.append((weight * patch).sum((1, 2, 3)) + p["x_embedder.proj.bias"] + places[r * columns + c])

    def embedded(name: str, value: float) -> Tensor:
        angles = torch.tensor([value * math.exp(-math.log(10000) * i / 128) for i in range(128)], dtype=torch.float64)
        hidden = p[f"{name}.mlp.0.weight"] @ torch.cat([angles.cos(), angles.sin()]) + p[f"{name}.mlp.0.bias"]
        return p[f"{name}.mlp.2.weight"] @ F.silu(hidden) + p[f"{name}.mlp.2.bias"]

    t = embedded("t_embedder", 321.5) + embedded("fps_embedder", fps)
    e = (p["t_block.1.weight"] @ F.silu(t) + p["t_block.1.bias"]).reshape(6, C)
    read = caption[0, :7] @ p["y_embedder.y_proj.fc1.weight"].T + p["y_embedder.y_proj.fc1.bias"]
    read = F.gelu(read, approximate="tanh") @ p["y_embedder.y_proj.fc2.weight"].T + p["y_embedder.y_proj.fc2.bias"]
    x = torch.stack(x)
    for n in range(SMALL_STDIT3["depth"]):
        for kind in ("spatial", "temporal"):
            prefix = f"{kind}_blocks.{n}."
            weights = {name.removeprefix(prefix): v for name, v in p.items() if name.startswith(prefix)}
            x = slow_block(weights, x, e, read, rows * columns, kind == "temporal")
    shift, scale = p["final_layer.scale_shift_table"] + t
    out = torch.zeros(8, frames, 2 * rows, 2 * columns, dtype=torch.float64)
    for n, row in enumerate(x):
        values = p["final_layer.linear.weight"] @ (normed(row) * (1 + scale) + shift) + p["final_layer.linear.bias"]
        f, r, c = n // (rows * columns), n // columns % rows, n % columns
        out[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = values.reshape(2, 2, 8).permute(2, 0, 1)
    torch.testing.assert_close(found, out[..., :h, :w], rtol=1e-4, atol=1e-4)  # angles of 321.5 are float32
