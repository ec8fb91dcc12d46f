"""Open-Sora's sampler, and its VAE's decoder."""

from __future__ import annotations

import math

import pytest
import torch
from small_pipelines import SIZES, SMALL, SMALL_STDIT3, SMALL_VAE, lively
from torch import Tensor
from torch.nn import functional as F

from ditbench.harness.models.families.opensora.stdit3 import STDiT3
from ditbench.harness.models.families.opensora.vae import CausalConv, OpenSoraVAE


@pytest.fixture(scope="module")
def small() -> STDiT3:
    return lively(STDiT3(**SMALL_STDIT3)).double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
