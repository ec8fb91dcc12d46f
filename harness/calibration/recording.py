"""Calibration: one pass of the float model's sampler, recorded once, kept on disk under the hash of what made it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of, float_copy
from ditbench.harness.calibration.reached import check_fused, unreached
from ditbench.harness.calibration.recorder import Recorder, read, saved_seconds, write
from ditbench.harness.common.code_identity import code_identity
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import cached, canonical_sha256
from ditbench.harness.common.progress import progress as progress_bar
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.calls import FEW, MORE, Call, float_dtype, placed, row_dims, side_by_side
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.samples.seeds import sample_seeds


class Estimate(NamedTuple):
    """What a transformer gives, in the form of diffusers' outputs: by name or by place."""

    sample: Tensor


@dataclass(frozen=True)
class Calibration:
    """The transformer's calls at every denoising step.

    steps[s]: the calls of step s as they were made, each with its own shapes, the steps in sampling order (high noise
    first). With guidance there are conditional and unconditional rows, in one call or in two, in the family's order. A row
    of a step counts through its calls; calls that are alike are put side by side when they are read. `key` is the content
    address; `cache` the folder where statistics derived from it are kept (None: nowhere).
    unreached: linear layers that no call of the sampler reached.
    """

    steps: tuple[tuple[Call, ...], ...]
    key: str
    cache: Path | None = None
    device: torch.device = torch.device("cpu")  # where models that are observed on it run
    saved_s: dict[str, float] = field(default_factory=dict, compare=False)  # seconds that the cache saved, by what
    unreached: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def per_step(self) -> tuple[Call, ...]:
        """All rows of each step as one call: of models whose calls are alike.

        Raises:
            UserError: those of a step are not.
        """
        found = [alike(calls) for calls in self.steps]
        if any(len(groups) != 1 for groups in found):
            raise UserError(
                "this model's calls of one step differ in their shapes; read the recording by rows or batches"
            )
        return tuple(side_by_side(groups[0]) for groups in found)

    def num_rows(self, step: int) -> int:
        return sum(call.num_rows for call in self.steps[step])

    def rows(self, step: int, wanted: int) -> list[Call]:
        """At most `wanted` rows of a step, evenly spread, so that conditional and null rows are both seen."""
        kept = spread(self.num_rows(step), wanted)
        return [call for call in picked(self.steps[step], kept) if call.num_rows]

    def call(self, model: nn.Module, step: int, inputs: Call | Sequence[Call]) -> Any:
        """What a built model (`build`, with its clock) gives for some rows of a step, in its own dtype, on its own device:
        its output, whose `sample` has one row for each. Calls of several shapes are made one after the other.
        """
        clock, dtype = clock_of(model), float_dtype(model)
        clock.set(step, self.num_steps)
        calls = [inputs] if isinstance(inputs, Call) else inputs
        return joined([model(**placed(call.arguments(), dtype, clock.step.device)) for call in calls])

    def num_batches(self, batch_size: int = 64) -> int:
        sizes = [sum(call.num_rows for call in group) for calls in self.steps for group in alike(calls)]
        return sum(-(-size // batch_size) for size in sizes)

    def batches(self, batch_size: int = 64, steps: Iterable[int] | None = None) -> Iterator[tuple[int, Call]]:
        """(step, inputs) in step order, at most batch_size rows of one shape at a time; steps: all of them, or some."""
        for step in range(self.num_steps) if steps is None else steps:
            for group in alike(self.steps[step]):
                for start in range(0, sum(call.num_rows for call in group), batch_size):
                    yield step, between(group, start, start + batch_size)


def calibrate(
    model: LoadedModel,
    sampler: Sampler,
    n: int,
    seed: int,
    *,
    batch_size: int = 64,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    prompts: Sequence[Prompt] = (),
) -> Calibration:
    """Record n samples with classes drawn at random (or with the model's calibration prompts), or read the recording of
    the same arguments from the cache.

    Raises:
        UserError: n < 1, or the model produces NaN.
    """
    key = key_of(model, sampler, n, seed, batch_size=batch_size, device=device, prompts=prompts)
    wanted = conditions_for_calibration(model, n, seed, prompts)
    device = torch.device(device)
    path = None if cache is None else cache / "calibration" / key / "inputs.safetensors"
    if path is not None and (kept := cached(path, read)) is not None:
        steps, silent = kept
        return Calibration(steps, key, path.parent, device, {"calibration": saved_seconds(path)}, silent)

    start_time = perf_counter()
    recorder = Recorder(
        sampler.steps, row_dims(model.step_inputs(FEW, device), model.step_inputs(MORE, device), model.adapter.ROWS)
    )
    transformer = float_copy(model.target(), dtype=getattr(torch, model.spec.dtype), device=device)
    starts = range(0, n, batch_size)
    bar = progress_bar(total=sampler.steps * len(starts), desc="calibrate")
    with torch.no_grad(), unreached(transformer) as left, bar as progress:
        for batch, start in enumerate(starts):

            def record(step: int, arguments: Mapping[str, Any], before: int = batch * sampler.steps) -> None:
                recorder(step, arguments)
                progress.update(before + step + 1 - progress.n)

            part = wanted.rows(start, min(start + batch_size, n))
            model.adapter.sample(model.pipe, transformer, part, sampler, on_call=record, decode=False)
    steps = recorder.finished()
    if not all(tensor.isfinite().all() for call in steps[-1] for tensor in call.tensors()):
        raise UserError(
            f"model {model.spec.name}: NaN in the float model's own samples; check the checkpoint and sampler"
        )
    check_fused(transformer, left)
    silent = tuple(sorted(left))
    if path is not None:
        write(path, steps, recorder.tensors, perf_counter() - start_time, silent)
    return Calibration(steps, key, None if path is None else path.parent, device, unreached=silent)


def key_of(
    model: LoadedModel,
    sampler: Sampler,
    n: int,
    seed: int,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    prompts: Sequence[Prompt] = (),
) -> str:
    """The key of what `calibrate` makes of the same arguments; nothing is made.

    Raises:
        UserError: n < 1, or a model that is told by prompts has none.
    """
    if n < 1:
        raise UserError(f"calibration.n must be at least 1, got {n}")
    wanted = conditions_for_calibration(model, n, seed, prompts)
    return canonical_sha256(
        {
            "model": model.fingerprint,
            "sampler": vars(sampler),
            "n": n,
            "seed": seed,
            "prompts": [prompt.text for prompt in wanted.prompts],
            "batch_size": batch_size,
            "device": torch.device(device).type,
            "code": code_identity(),
        }
    )


def conditions_for_calibration(model: LoadedModel, n: int, seed: int, prompts: Sequence[Prompt] = ()) -> Conditions:
    """Classes drawn with the seed, or the prompts in turn."""
    seeds = sample_seeds(seed, n, stream="calibration")
    if model.adapter.CONDITION == PROMPTS:
        if not prompts:
            raise UserError(f"model {model.spec.name} is told by prompts what to draw; set calibration.prompts")
        return Conditions(seeds, prompts=tuple(prompts[index % len(prompts)] for index in range(n)))
    classes = model.adapter.num_classes(model.transformer)
    return Conditions(seeds, torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)))


def selected(calibration: Calibration, rows_of_step: list[Tensor], chosen: str) -> Calibration:
    """Some rows of each step (none, or one several times, is allowed); `chosen` says which, and is part of the key.

    What is derived from it is not cached: the cache's folder belongs to the whole recording.
    """
    steps = tuple(tuple(picked(calls, rows)) for calls, rows in zip(calibration.steps, rows_of_step, strict=True))
    key = canonical_sha256({"of": calibration.key, "chosen": chosen})
    saved_s, silent = calibration.saved_s, calibration.unreached
    return Calibration(steps, key, None, calibration.device, saved_s, silent)


def spread(length: int, wanted: int) -> Tensor:
    """At most `wanted` indices below length, evenly spread, int64."""
    return torch.linspace(0, length - 1, min(wanted, length)).round().long().unique()


def alike(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that can be put side by side, in the order of the first of each."""
    return [[calls[place] for place in group] for group in _alike(calls)]


def _alike(calls: Sequence[Call]) -> list[list[int]]:
    groups: list[list[int]] = []
    for place, call in enumerate(calls):
        group = next((group for group in groups if calls[group[0]].is_like(call)), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


def picked(calls: Sequence[Call], kept: Tensor) -> list[Call]:
    """Rows of a step, counted through its calls: in the order asked for, one call for all that are alike, some perhaps empty."""
    ends = torch.tensor([call.num_rows for call in calls]).cumsum(0)
    owner = torch.searchsorted(ends, kept, right=True)
    found = []
    for group in _alike(calls):
        parts, order = [], []
        for place in group:
            mine = (owner == place).nonzero().flatten()
            start = ends[place] - calls[place].num_rows
            parts.append(calls[place].pick(kept[mine] - start))
            order.append(mine)
        found.append(side_by_side(parts).pick(torch.cat(order).argsort()))
    return found


def between(calls: Sequence[Call], start: int, stop: int) -> Call:
    """Rows start … stop − 1 of calls that are alike, counted through; of one call nothing is copied."""
    parts, first = [], 0
    for call in calls:
        end = first + call.num_rows
        if first < stop and start < end:
            parts.append(call.pick(slice(max(start - first, 0), stop - first)))
        first = end
    return side_by_side(parts)


def joined(outputs: list[Any]) -> Any:
    """What calls on a step's rows gave in turn, as one output; a list of one tensor per row becomes a tensor."""
    if len(outputs) == 1 and not isinstance(getattr(outputs[0], "sample", None), list):
        return outputs[0]
    samples = [torch.stack(each.sample) if isinstance(each.sample, list) else each.sample for each in outputs]
    return Estimate(torch.cat(samples))
