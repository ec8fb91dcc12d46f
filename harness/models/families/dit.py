"""DiT (Peebles & Xie, arXiv:2212.09748) through diffusers: `DiTPipeline`, `DiTTransformer2DModel`, adaLN-Zero blocks.

In each block, chunk order of `norm1.linear`: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp. q, k, v
read LN(x)·(1 + scale_msa) + shift_msa, the first FFN layer reads the mlp pair, `to_out` reads the attention output, the
second FFN layer reads GELU, through which nothing can be folded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.placement import placed_on
from ditbench.harness.models.base import Correction, Drawn, OnCall, Sampler
from ditbench.harness.models.calls import RowDims
from ditbench.harness.models.checkpoint import AnotherFamily, Checkpoint
from ditbench.harness.models.decoding import decode_within_memory
from ditbench.harness.models.samplers import CorrectedDDPM
from ditbench.harness.quant.blocks import OneStream
from ditbench.harness.quant.target import AdaLNRows, Site, ValueRows
from ditbench.harness.samples.conditions import LABELS, Conditions

BLOCKS = "transformer_blocks"
FLOAT_IN_BLOCKS = r"norm1\."  # the adaLN linear and the embedders that diffusers keeps per block
ALWAYS_FLOAT = ""
SAMPLERS = ("ddim", "ddpm")
CONDITION = LABELS
ROWS: RowDims = {}  # inferred


def load(checkpoint: Checkpoint) -> DiTPipeline:
    pipe = checkpoint.pipeline()
    found = getattr(pipe, "transformer", None)
    if not isinstance(found, DiTTransformer2DModel):
        raise AnotherFamily(f"its transformer is a {type(found).__name__}, not a DiTTransformer2DModel")
    return pipe


def random_pipeline(arguments: dict[str, Any], dtype: torch.dtype) -> DiTPipeline:
    """A pipeline without VAE around a transformer with random weights, adaLN included (adaLN-Zero would be inert)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        transformer = DiTTransformer2DModel(**arguments)
    finally:
        torch.set_default_dtype(default)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return DiTPipeline(transformer, vae=None, scheduler=scheduler)


def blocks(transformer: nn.Module) -> list[str]:
    return [f"{BLOCKS}.{index}" for index in range(len(transformer.transformer_blocks))]


def block_call(transformer: nn.Module) -> OneStream:
    return OneStream()


def sites(transformer: nn.Module) -> list[Site]:
    width = transformer.inner_dim

    def rows(chunk: int) -> slice:
        return slice(chunk * width, (chunk + 1) * width)

    found = []
    for block in blocks(transformer):
        adaln = f"{block}.norm1.linear"
        found += [
            Site(
                f"{block}.attn_in",
                tuple(f"{block}.attn1.to_{operand}" for operand in "qkv"),
                (AdaLNRows(adaln, shift_rows=rows(0), scale_rows=rows(1)),),
            ),
            Site(f"{block}.attn_out", (f"{block}.attn1.to_out.0",), (ValueRows(f"{block}.attn1.to_v"),)),
            Site(f"{block}.ff_in", (f"{block}.ff.net.0.proj",), (AdaLNRows(adaln, rows(3), rows(4)),)),
            Site(f"{block}.ff_mid", (f"{block}.ff.net.2",)),
        ]
    return found


def attention(transformer: nn.Module) -> list[str]:
    return [f"{block}.attn1" for block in blocks(transformer)]


def num_classes(transformer: nn.Module) -> int:
    return transformer.config.num_embeds_ada_norm


def sample(
    pipe: DiTPipeline,
    transformer: nn.Module,
    conditions: Conditions,
    sampler: Sampler,
    *,
    on_call: OnCall | None = None,
    correct: Correction | None = None,
    decode: bool = True,
) -> Drawn:
    """`DiTPipeline.__call__` with one generator per sample, latents in float32 and the step index published.

    Latents are (B, C, h, w), on the transformer's device; noise is drawn on the CPU. Guidance > 1 doubles the batch: [conditional, null].
    on_call(step, kwargs) sees the transformer's inputs; `correct` may replace the guided estimate, and DDPM's variance.
    """
    config, device = transformer.config, clock_of(transformer).step.device
    dtype = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.dtype
    learned_variance = config.out_channels == 2 * config.in_channels
    most = pipe.scheduler.config.num_train_timesteps
    if sampler.steps > most:
        raise UserError(f"protocol.steps must be at most {most}, the model's training steps; got {sampler.steps}")
    scheduler = _scheduler(pipe, sampler, learned_variance)
    scheduler.set_timesteps(sampler.steps)
    guided = sampler.guidance > 1
    assert conditions.labels_N is not None, "a class-conditional model"
    labels = conditions.labels_N.to(device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])

    generators = [torch.Generator().manual_seed(seed) for seed in conditions.seeds]
    shape = (config.in_channels, config.sample_size, config.sample_size)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    for step, timestep in enumerate(scheduler.timesteps):
        transformer.clock.set(step, sampler.steps)
        model_input = torch.cat([latents, latents]) if guided else latents
        inputs = {
            "hidden_states": scheduler.scale_model_input(model_input, timestep).to(dtype),
            "timestep": timestep.expand(len(labels)).to(device),
            "class_labels": labels,
        }
        if on_call is not None:
            on_call(step, inputs)
        output = transformer(**inputs).sample.float()
        noise, variance = output[:, : config.in_channels], output[:, config.in_channels :]
        if guided:
            conditional, null = noise.chunk(2)
            noise = null + sampler.guidance * (conditional - null)
            variance = variance.chunk(2)[0]
        if correct is not None and correct.noise is not None:
            noise = correct.noise(step, noise)
        if sampler.kind == "ddpm":
            if correct is not None and correct.variance is not None:
                scheduler.correct = partial(correct.variance, step)
            estimate = torch.cat([noise, variance], 1) if learned_variance else noise
            latents = scheduler.step(estimate, timestep, latents, generator=generators).prev_sample
        else:
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return Drawn(latents, pixels(pipe, latents) if decode else None)


def _scheduler(pipe: DiTPipeline, sampler: Sampler, learned_variance: bool) -> DDIMScheduler | CorrectedDDPM:
    if sampler.kind == "ddim":
        return DDIMScheduler.from_config(pipe.scheduler.config)
    variance = "learned_range" if learned_variance else "fixed_small"
    return CorrectedDDPM.from_config(pipe.scheduler.config, variance_type=variance, clip_sample=False)


def pixels(pipe: DiTPipeline, latents: Tensor) -> Tensor:
    """Latents → images (B, 3, H, W) in [−1, 1], float32; without a VAE the latents are the pixels."""
    if pipe.vae is None:
        images = latents
    else:
        with placed_on(pipe.vae, latents.device):
            scaled = latents.to(next(pipe.vae.parameters())) / pipe.vae.config.scaling_factor
            images = decode_within_memory(pipe.vae, pipe.vae.decode, scaled).sample.float()
    return (images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)).clamp(-1, 1)


def step_inputs(pipe: DiTPipeline, batch: int, device: torch.device) -> dict[str, Tensor]:
    config = pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.randint(config.num_embeds_ada_norm, (batch,), generator=generator),
    }
