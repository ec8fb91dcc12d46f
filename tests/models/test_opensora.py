"""STDiT3 against its equations, the public checkpoint's names, the sampler and the VAE's decoder."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_2d_sincos_pos_embed
from safetensors.torch import load_file, save_file
from small_pipelines import SIZES, SMALL, SMALL_STDIT3, SMALL_TEXT, SMALL_VAE, lively
from torch import Tensor
from torch.nn import functional as F

from harness.errors import UserError
from harness.models.base import ModelSpec, load_model
from harness.models.opensora import checkpoint
from harness.models.opensora.stdit3 import Block, STDiT3, place_embedding, rotated
from harness.models.opensora.vae import CausalConv, OpenSoraVAE

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


# The sampler.


def test_the_sampler_follows_the_flow_at_the_times_of_open_sora():
    """t' = r t / (1 + (r − 1) t); z ← z + v (t'_i − t'_{i+1}), v guided, from the model's own answers."""
    pipe, steps, guidance = SMALL["opensora"](), 4, 3.0
    pipe.set_progress_bar_config(disable=True)
    times, answers, seen = [], [], {}

    def see(module, args, kwargs, output) -> None:
        times.append(float(kwargs["timestep"][0]))
        answers.append(output[0])
        seen.update(kwargs)

    pipe.transformer.register_forward_hook(see, with_kwargs=True)
    size = SIZES["opensora"]
    found = pipe(
        ["a red circle"], **size, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=[torch.Generator().manual_seed(3)],
    ).frames  # fmt: skip

    r = math.sqrt(size["height"] * size["width"] / 512**2) * math.sqrt(3)
    moved = [r * t / (1 + (r - 1) * t) for t in (1 - i / steps for i in range(steps))]
    assert times == pytest.approx([1000 * t for t in moved], rel=1e-5)
    z = torch.randn(1, 4, 3, 8, 5, generator=torch.Generator().manual_seed(3))
    for answer, now, then in zip(answers, moved, [*moved[1:], 0.0], strict=True):
        conditional, unconditional = answer[:, :4]
        z = z + (unconditional + guidance * (conditional - unconditional)) * (now - then)
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-5)

    states, mask = seen["encoder_hidden_states"], seen["encoder_attention_mask"]
    torch.testing.assert_close(states[1], pipe.transformer.y_embedder.y_embedding)
    assert torch.equal(mask[0], mask[1]) and 3 < int(mask[0].sum()) <= 12
    assert seen["fps"] == 24.0 and (seen["height"], seen["width"]) == (16, 10)


def test_a_picture_is_a_video_of_one_frame_at_the_rate_of_pictures():
    pipe, rates = SMALL["opensora"](), []
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: rates.append(kwargs["fps"]), with_kwargs=True)
    frames = pipe(["a cross"], height=16, width=16, num_frames=1, num_inference_steps=1).frames
    assert frames.shape == (1, 1, 3, 16, 16) and rates == [120.0]


def test_a_scheduler_that_would_not_move_the_times_is_refused():
    pipe = SMALL["opensora"]()
    pipe.scheduler = type(pipe.scheduler)()
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        pipe(["a cross"], **SIZES["opensora"])


# The VAE.


@pytest.mark.parametrize(
    ("frames", "latent_frames"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (34, 10), (51, 15), (60, 18)]
)
def test_latents_have_the_size_that_the_public_vae_gives(frames, latent_frames):
    with torch.device("meta"):
        assert OpenSoraVAE().latent_size(frames, 240, 426) == (latent_frames, 30, 53)


def test_the_vaes_names_are_those_of_the_public_checkpoint():
    def causal(channels: int, out: int, side: int, bias: bool = True) -> dict[str, tuple]:
        weight = {"conv.weight": (out, channels, side, side, side)}
        return weight | {"conv.bias": (out,)} if bias else weight

    def res(channels: int, out: int) -> dict[str, tuple]:
        convs = {"conv1": causal(channels, out, 3, False), "conv2": causal(out, out, 3, False)}
        if channels != out:
            convs["conv3"] = causal(channels, out, 1, False)
        norms = {f"norm{n}.{w}": (width,) for n, width in ((1, channels), (2, out)) for w in ("weight", "bias")}
        return norms | {f"{name}.{key}": shape for name, conv in convs.items() for key, shape in conv.items()}

    modules: dict[str, dict[str, tuple]] = {
        "post_quant_conv": causal(4, 4, 1),
        "decoder.conv1": causal(4, 512, 3),
        "decoder.conv_blocks.1": causal(256, 512, 3),
        "decoder.conv_blocks.2": causal(512, 1024, 3),
        "decoder.norm1": {"weight": (128,), "bias": (128,)},
        "decoder.conv_out": causal(128, 4, 3),
        **{f"decoder.res_blocks.{n}": res(512, 512) for n in range(4)},
    }
    for level, (entry, out) in enumerate([(256, 128), (256, 256), (512, 256), (512, 512)]):
        modules |= {f"decoder.block_res_blocks.{level}.{n}": res(out if n else entry, out) for n in range(4)}
    expected = {f"temporal_vae.{m}.{key}": shape for m, keys in modules.items() for key, shape in keys.items()}
    expected |= {"shift": (1, 4, 1, 1, 1), "scale": (1, 4, 1, 1, 1)}
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in OpenSoraVAE().state_dict().items()}
    assert {name: shape for name, shape in found.items() if not name.startswith("spatial_vae.")} == expected
    assert found["spatial_vae.decoder.conv_in.weight"] == (512, 4, 3, 3)


def test_a_frame_sees_only_frames_before_it():
    conv, x = CausalConv(2, 3, 3).double(), normal(1, 2, 4, 5, 5)
    other = x.clone()
    other[:, :, 2] += 1
    with torch.no_grad():
        moved = (conv(x) - conv(other)).abs().amax((0, 1, 3, 4)) > 1e-9
        assert moved.tolist() == [False, False, True, True]
        alone = F.conv2d(x[:, :, 0], conv.conv.weight[:, :, -1], conv.conv.bias, padding=1)
        torch.testing.assert_close(conv(x)[:, :, 0], alone)


def test_latents_are_decoded_chunk_by_chunk_as_written():
    """Convolutions padded by hand, in the order of the names; 17 + 6 frames of 5 + 2 latent ones, 2 of which go."""
    vae = lively(OpenSoraVAE(**SMALL_VAE)).double()
    p = {name.removeprefix("temporal_vae."): v for name, v in vae.state_dict().items()}
    latents = normal(1, 4, 7, 2, 3)

    def conv(name: str, x: Tensor) -> Tensor:
        weight, bias = p[f"{name}.conv.weight"], p.get(f"{name}.conv.bias")
        side = weight.shape[-1]
        before = torch.zeros(*x.shape[:2], side - 1, *x.shape[3:], dtype=x.dtype)
        return F.conv3d(torch.cat([before, x], 2), weight, bias, padding=(0, side // 2, side // 2))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 2, p[f"{name}.weight"], p[f"{name}.bias"]))

    def res(name: str, x: Tensor) -> Tensor:
        inner = conv(f"{name}.conv2", norm(f"{name}.norm2", conv(f"{name}.conv1", norm(f"{name}.norm1", x))))
        return inner + (conv(f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in p else x)

    decoded = []
    for chunk, dropped in ((latents[:, :, :5], 3), (latents[:, :, 5:], 2)):
        x = conv("post_quant_conv", chunk * p["scale"] + p["shift"])
        x = res("decoder.res_blocks.0", conv("decoder.conv1", x))
        for level in (2, 1, 0):
            x = res(f"decoder.block_res_blocks.{level}.0", x)
            if level:
                pairs = conv(f"decoder.conv_blocks.{level - 1}", x)
                x = torch.stack([pairs[:, 0::2], pairs[:, 1::2]], 3).flatten(2, 3)
        decoded.append(conv("decoder.conv_out", norm("decoder.norm1", x))[:, :, dropped:])
    frames = torch.cat(decoded, 2)
    with torch.no_grad():
        expected = torch.stack([vae.spatial_vae.decode(f / 0.18215).sample for f in frames.unbind(2)], 1)
        found = vae.decode(latents, 23)
    assert found.shape == (1, 23, 3, 4, 6)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# The public layout.


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A small pipeline, and three folders with it as the authors publish theirs."""
    monkeypatch.setattr(checkpoint, "OpenSoraVAE", functools.partial(OpenSoraVAE, **SMALL_VAE))
    torch.manual_seed(0)
    pipe = SMALL["opensora"]()
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    weights = pipe.transformer.state_dict() | {"rope.freqs": 10000 ** (-torch.arange(0, 8, 2) / 8)}
    save_file(weights, tmp_path / "transformer" / "model.safetensors")
    public = SMALL_STDIT3 | {"model_type": "STDiT3", "architectures": ["STDiT3"], "qk_norm": True, "drop_path": 0.0}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(public))
    both = {re.sub(r"^spatial_vae\.", "spatial_vae.module.", k): v for k, v in pipe.vae.state_dict().items()}
    both |= {
        "temporal_vae.encoder.conv_in.conv.weight": torch.ones(1),
        "temporal_vae.quant_conv.conv.bias": torch.ones(1),
    }
    save_file({name: tensor.contiguous() for name, tensor in both.items()}, tmp_path / "vae" / "model.safetensors")
    (tmp_path / "vae" / "config.json").write_text("{}")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    pipe.tokenizer.save_pretrained(tmp_path / "text_encoder")
    return pipe, tmp_path


def load(folder: Path | str, **more):
    return load_model(ModelSpec("mine", "opensora", source=str(folder), size=SIZES["opensora"], **more))


def changed(folder: Path, **weights: Tensor | None) -> None:
    path = folder / "transformer" / "model.safetensors"
    kept = {name: tensor for name, tensor in (load_file(path) | weights).items() if tensor is not None}
    save_file(kept, path)


def test_three_downloads_are_the_pipeline(downloads):
    pipe, folder = downloads
    loaded = load(folder)
    frames = []
    for each in (pipe, loaded.pipe):
        each.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(0)]
        frames.append(each(["a red circle"], **SIZES["opensora"], num_inference_steps=2, generator=generator).frames)
    torch.testing.assert_close(*frames, rtol=0, atol=1e-5)
    assert {p.dtype for p in load(folder, dtype="bfloat16").transformer.parameters()} == {torch.bfloat16}


def test_frequencies_that_were_saved_in_bf16_are_taken(downloads):
    _, folder = downloads
    changed(folder, **{"rope.freqs": (10000 ** (-torch.arange(0, 8, 2) / 8)).bfloat16()})
    load(folder)


def test_other_frequencies_are_refused(downloads):
    _, folder = downloads
    changed(folder, **{"rope.freqs": 100 ** (-torch.arange(0, 8, 2) / 8)})
    with pytest.raises(UserError, match=r"not a checkpoint of family 'opensora': rope.freqs"):
        load(folder)


def test_a_missing_tensor_is_refused(downloads):
    _, folder = downloads
    changed(folder, **{"temporal_blocks.1.attn.q_norm.weight": None})
    with pytest.raises(UserError, match="not a checkpoint of family 'opensora'"):
        load(folder)


def test_a_transformer_without_normed_queries_is_refused(downloads):
    """As STDiT2 can be; its names would be missing, and the reason hard to see."""
    _, folder = downloads
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"qk_norm": False}))
    with pytest.raises(UserError, match="qk_norm must be True, as in Open-Sora 1.2; got False"):
        load(folder)


def test_a_download_that_is_missing_is_named_with_the_command_that_fetches_it(downloads):
    _, folder = downloads
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(
        UserError, match="no config.json in vae; .*hf download hpcai-tech/OpenSora-VAE-v1.2 --local-dir"
    ):
        load(folder)
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match="no transformer/config.json in it"):
        load(folder)


def test_a_hub_id_without_a_network_says_how_to_fetch_all_three(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load("hpcai-tech/OpenSora-STDiT-v3")
    for source in ("hpcai-tech/OpenSora-STDiT-v3", "hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"):
        assert f"`hf download {source}" in str(error.value) or f"; hf download {source}" in str(error.value)
    assert "model.source=./weights/opensora" in str(error.value)


def test_outliers_in_value_rows_leave_queries_and_keys_alone(downloads):
    """One layer makes all three: what the fold and the stress rescale are its last rows."""
    _, folder = downloads
    plain, stressed = load(folder), load(folder, stress={"channels": 3, "log2_factor": 4, "seed": 0})
    name = "temporal_blocks.0.attn.qkv"
    before, after = (each.transformer.get_submodule(name).weight for each in (plain, stressed))
    assert torch.equal(before[: 2 * C], after[: 2 * C]) and not torch.equal(before[2 * C :], after[2 * C :])
    inputs = plain.step_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(stressed.transformer(**inputs).sample, plain.transformer(**inputs).sample)
