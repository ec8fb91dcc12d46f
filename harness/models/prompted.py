"""Text-to-image and text-to-video families: sampling is the diffusers pipeline's own `__call__`, watched from outside.

A family says which classes it is made of, where its blocks and modulation rows are, and what its pipeline is called with.
The pipeline runs with the given transformer in place of its own; hooks publish the denoising step, show the transformer's
arguments to whoever records them, and let a method correct what the scheduler gets.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import Correction, Drawn, OnCall, Sampler
from ditbench.harness.models.calls import RowDims, float_dtype, placed
from ditbench.harness.models.checkpoint import AnotherFamily, Checkpoint
from ditbench.harness.models.given_noise import beginning_with
from ditbench.harness.models.parts import replaced, running_on
from ditbench.harness.models.samplers import PIPELINE, SCHEDULERS, CorrectedDDPM
from ditbench.harness.models.transformer_only import TransformerOnly, random_transformer
from ditbench.harness.quant.blocks import BlockCall, OneStream, by_name
from ditbench.harness.quant.experts import FIRST, SECOND, Experts, of_each
from ditbench.harness.quant.target import Site
from ditbench.harness.samples.conditions import PROMPTS, Conditions


def no_sites(transformer: nn.Module) -> list[Site]:
    """Nothing can be folded: every transform runs online."""
    return []


@dataclass(frozen=True)
class PipelineFamily:
    """One family, told by prompts.

    pipelines, transformer: names of diffusers classes. lists: attributes of the transformer that list its blocks, in the
    order of execution (in_turn: one of each list at a time). stream: how a block is called. sites: the inputs whose
    producers are known. call: what the pipeline's `__call__` gets beside prompt, steps, guidance and generators. guidance: the
    name of its guidance argument; unguided: the scale that switches guidance off. ROWS: where an argument of the transformer
    has its rows, if that cannot be seen from calls on two and on three samples. SAMPLERS: schedulers it can run.
    pixels: latents of a pipeline without a VAE → pixels (B, 3, H, W) or (B, F, 3, H, W). size: height, width and
    num_frames, where a model says other ones than `call`. INDEX: the file by which a local folder is known.
    attention_modules: of a block, attention that has no processor of diffusers', or the only one that `protocol.attention=true` means.
    LINEAR_ATTENTION: a regular expression of attention modules that are no softmax(q kᵀ) v; they stay in float.
    """

    pipelines: tuple[str, ...]
    transformer: str
    lists: tuple[str, ...] = ("transformer_blocks",)
    FLOAT_IN_BLOCKS: str = r"norm"
    ALWAYS_FLOAT: str = ""
    SAMPLERS: tuple[str, ...] = (PIPELINE,)
    ROWS: RowDims = field(default_factory=dict)
    stream: Callable[[nn.Module], BlockCall] = lambda transformer: OneStream()
    in_turn: bool = False
    CONDITION: str = PROMPTS
    sites: Callable[[nn.Module], list[Site]] = no_sites
    attention_modules: tuple[str, ...] = ()
    LINEAR_ATTENTION: str = ""
    call: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    pixels: Callable[[Tensor], Tensor] = lambda latents: latents
    size: dict[str, int] = field(default_factory=dict)
    INDEX: str = "model_index.json"

    def load(self, checkpoint: Checkpoint) -> Any:
        pipe = checkpoint.pipeline()
        self._check(pipe)
        return pipe

    def prepare(self, pipe: Any) -> None:
        """Called once the pipeline is there, with or without its weights: what has to be done to it in place."""

    def _check(self, pipe: Any) -> None:
        if type(pipe).__name__ in self.pipelines and pipe.transformer is None:
            raise UserError(f"its transformer is empty, and a {type(pipe).__name__} draws nothing without it")
        found = type(pipe.transformer).__name__ if hasattr(pipe, "transformer") else "missing"
        if type(pipe).__name__ not in self.pipelines or found != self.transformer:
            raise AnotherFamily(
                f"a {type(pipe).__name__} whose transformer is a {found}; expected {' or '.join(self.pipelines)} with a "
                f"{self.transformer}"
            )

    def random_pipeline(self, arguments: dict[str, Any], dtype: torch.dtype) -> TransformerOnly:
        return random_transformer(self.transformer, arguments, dtype)

    def blocks(self, transformer: nn.Module) -> list[str]:
        return of_each(transformer, self._blocks)

    def _blocks(self, transformer: nn.Module) -> list[str]:
        lists = [[f"{name}.{index}" for index in range(len(getattr(transformer, name)))] for name in self.lists]
        return list(chain(*zip(*lists, strict=True))) if self.in_turn else list(chain(*lists))

    def block_call(self, transformer: nn.Module) -> BlockCall:
        return self.stream(transformer)

    def attention(self, transformer: nn.Module) -> list[str]:
        return [f"{block}.{name}" for block in self.blocks(transformer) for name in self.attention_modules]

    def num_classes(self, transformer: nn.Module) -> int:
        raise UserError(f"a {self.transformer} is told by prompts, not by class labels")

    def sample(
        self,
        pipe: Any,
        transformer: nn.Module,
        conditions: Conditions,
        sampler: Sampler,
        *,
        on_call: OnCall | None = None,
        correct: Correction | None = None,
        decode: bool = True,
    ) -> Drawn:
        """The pipeline's own loop on the transformer's device, latents and scheduler in float32, one generator per sample. Noise is
        drawn on the CPU, the same for every device.

        Raises:
            UserError: a transformer alone (random weights) reads no prompts; a sampler that does not make `steps` steps.
        """
        if isinstance(pipe, TransformerOnly):
            raise UserError("random weights alone draw nothing; this model is for `ditbench bench` with method=rtn")
        if sampler.guidance_2 is not None and not isinstance(transformer, Experts):
            raise UserError("protocol.guidance_2 is of a second transformer, and this model has one; set it to null")
        scheduler, device = self._scheduler(pipe, sampler), clock_of(transformer).step.device
        generators = [torch.Generator().manual_seed(seed) for seed in conditions.seeds]
        pixel_space = getattr(pipe, "vae", None) is None
        with (
            running_on(
                pipe,
                device,
                **denoising_with(transformer),
                **self.parts(pipe, sampler.guidance),
                scheduler=scheduler,
            ) as running,
            beginning_with(running, conditions.noise),
            watched(transformer, scheduler, sampler, on_call, correct) as seen,
            decoding_in_its_dtype(pipe),
        ):
            running.set_progress_bar_config(disable=True)
            frames = running(
                prompt=[prompt.text for prompt in conditions.prompts],
                num_inference_steps=sampler.steps,
                generator=generators,
                output_type="pt" if decode and not pixel_space else "latent",
                return_dict=False,
                **self.settings(pipe, sampler.guidance, len(conditions)) | _negative(pipe, sampler, len(conditions)),
                **({} if sampler.guidance_2 is None else {"guidance_scale_2": sampler.guidance_2}),
            )[0]
        if seen.step != sampler.steps:
            raise UserError(
                f"protocol.steps={sampler.steps}, but the scheduler made {seen.step} steps; use a first-order sampler"
            )
        assert seen.latents is not None, "a sampler makes at least one step"
        latents = seen.latents.float()
        if not decode:
            return Drawn(latents, None)
        if pixel_space:
            return Drawn(latents, self.pixels(latents).clamp(-1, 1))
        return Drawn(latents, frames.float() * 2 - 1)

    def step_inputs(self, pipe: Any, batch: int, device: torch.device) -> dict[str, Any]:
        """What the pipeline calls its transformer with, for `batch` samples of one prompt, without guidance; made on the device."""
        if isinstance(pipe, TransformerOnly):
            return pipe.step_inputs(batch)
        found: dict[str, Any] = {}

        def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.update(call_arguments(module, args, kwargs))
            raise _Taken

        conditions = Conditions(tuple(range(batch)), prompts=self._any_prompts(batch))
        scheduler = self._scheduler(pipe, Sampler(self.SAMPLERS[0], 2, 1.0))
        handle = pipe.transformer.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
        try:
            parts = denoising_with(pipe.transformer) | self.parts(pipe, self.unguided)
            with running_on(pipe, device, **parts, scheduler=scheduler) as running:
                running.set_progress_bar_config(disable=True)
                running(
                    prompt=[prompt.text for prompt in conditions.prompts],
                    num_inference_steps=2,
                    generator=[torch.Generator().manual_seed(seed) for seed in conditions.seeds],
                    output_type="latent",
                    **self.settings(pipe, self.unguided, batch),
                )
        except _Taken:
            pass
        finally:
            handle.remove()
        return found

    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        """What the pipeline's `__call__` gets beside prompts, steps and generators."""
        return {self.guidance: guidance} | self.call(pipe) | self.size

    def parts(self, pipe: Any, guidance: float) -> dict[str, Any]:
        """What takes the place of the pipeline's own parts while it draws, beside transformer and scheduler."""
        return {}

    def timesteps(self, pipe: Any, sampler: Sampler) -> list[float]:
        """The noise level of each step, in sampling order, by the scheduler alone."""
        scheduler = self._scheduler(pipe, sampler)
        scheduler.set_timesteps(sampler.steps)
        return scheduler.timesteps.tolist()

    @staticmethod
    def _any_prompts(count: int):
        from ditbench.harness.samples.samples import Prompt

        return (Prompt("a red circle"),) * count

    def _scheduler(self, pipe: Any, sampler: Sampler) -> Any:
        kind = type(pipe.scheduler) if sampler.kind == PIPELINE else SCHEDULERS[sampler.kind]
        scheduler = kind.from_config(pipe.scheduler.config)
        most = scheduler.config.num_train_timesteps
        if sampler.steps > most:
            raise UserError(f"protocol.steps must be at most {most}, the model's training steps; got {sampler.steps}")
        return scheduler


def _negative(pipe: Any, sampler: Sampler, samples: int) -> dict[str, Any]:
    if sampler.negative_prompt is None:
        return {}
    if "negative_prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"a {type(pipe).__name__} takes no negative prompt; set protocol.negative_prompt=null")
    return {"negative_prompt": [sampler.negative_prompt] * samples}


def denoising_with(transformer: nn.Module) -> dict[str, nn.Module]:
    """The parts of a pipeline that a transformer stands for: of experts both, since they choose by themselves."""
    return dict.fromkeys((FIRST, SECOND) if isinstance(transformer, Experts) else (FIRST,), transformer)


class _Taken(Exception):
    """Raised when the arguments of the first call are known: the model need not run."""


@dataclass
class Seen:
    """What the scheduler has done so far."""

    step: int = 0
    latents: Tensor | None = None


@contextmanager
def watched(
    transformer: nn.Module, scheduler: Any, sampler: Sampler, on_call: OnCall | None, correct: Correction | None
) -> Iterator[Seen]:
    """Count steps by the scheduler's, set the model's clock, show its arguments, correct its estimates.

    The transformer computes in its own dtype and gives float32 back: the latents stay in float32 whatever runs.
    """
    seen, clock, dtype = Seen(), clock_of(transformer), float_dtype(transformer)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        clock.set(min(seen.step, sampler.steps - 1), sampler.steps)
        arguments = call_arguments(module, args, kwargs)
        if on_call is not None:
            on_call(seen.step, arguments)
        return (), placed(arguments, dtype, clock.step.device) | {"return_dict": kwargs.get("return_dict", True)}

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(in_float32(part) for part in output)
        return type(output)(sample=in_float32(output.sample))

    step = scheduler.step

    @functools.wraps(step)
    def stepped(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if correct is not None and correct.noise is not None:
            model_output = correct.noise(seen.step, model_output)
        if correct is not None and correct.variance is not None and isinstance(scheduler, CorrectedDDPM):
            scheduler.correct = functools.partial(correct.variance, seen.step)
        result = step(model_output, *args, **kwargs)
        seen.latents = (result[0] if isinstance(result, tuple) else result.prev_sample).detach()
        seen.step += 1
        return result

    handles = [
        transformer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        transformer.register_forward_hook(leave),
    ]
    scheduler.step = stepped
    try:
        yield seen
    finally:
        scheduler.step = step
        for handle in handles:
            handle.remove()


def in_float32(part: Any) -> Any:
    """A tensor, or a list of one per sample."""
    if isinstance(part, list):
        return [in_float32(each) for each in part]
    return part.float() if isinstance(part, Tensor) else part


@contextmanager
def decoding_in_its_dtype(pipe: Any) -> Iterator[None]:
    """The VAE gets the latents in its own dtype; most pipelines hand them over as they are."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield
        return
    dtype = float_dtype(vae)
    with replaced(vae, "decode", lambda decode, latents, *args, **more: decode(latents.to(dtype), *args, **more)):
        yield


def call_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The transformer's arguments by name, but for how it should wrap its answer."""
    return {name: value for name, value in by_name(module, args, kwargs).items() if name != "return_dict"}
