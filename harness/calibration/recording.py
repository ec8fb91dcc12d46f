"""Calibration: one pass of the float model's sampler, recorded once, kept on disk under the hash of what made it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of, float_copy
from ditbench.harness.calibration.reached import check_fused, unreached
from ditbench.harness.common.code_identity import code_identity
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path, cached, canonical_sha256
from ditbench.harness.common.progress import progress as progress_bar
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.calls import Shape, float_dtype, placed, take_apart
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.samples.seeds import sample_seeds

SECONDS = "seconds"  # metadata of cached files


@dataclass(frozen=True)
class Calibration:
    """The transformer's inputs at every denoising step.

    per_step[s]: {argument name: tensor with one row per model-call row}, the steps in sampling order (high noise first);
    shapes[s]: what else the transformer is called with at that step. With guidance, each recorded call has conditional
    and unconditional rows, in the family's order. `key` is the content address; `cache` the folder where statistics
    derived from it are kept (None: nowhere). unreached: linear layers that no call of the sampler reached.
    """

    per_step: tuple[dict[str, Tensor], ...]
    key: str
    shapes: tuple[Shape, ...] = ()  # none: the rows are all there is
    cache: Path | None = None
    device: torch.device = torch.device("cpu")  # where models that are observed on it run
    saved_s: dict[str, float] = field(default_factory=dict, compare=False)  # seconds that the cache saved, by what
    unreached: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        return len(self.per_step)

    def num_rows(self, step: int) -> int:
        return len(next(iter(self.per_step[step].values())))

    def rows(self, step: int, wanted: int) -> dict[str, Tensor]:
        """The inputs of at most `wanted` rows of a step, evenly spread, so that conditional and null rows are both seen."""
        kept = spread(self.num_rows(step), wanted)
        return {name: tensor[kept] for name, tensor in self.per_step[step].items()}

    def call(self, model: nn.Module, step: int, inputs: dict[str, Tensor]) -> Any:
        """What a built model (`build`, with its clock) gives for some rows of a step, in its own dtype, on its own device."""
        clock = clock_of(model)
        clock.set(step, self.num_steps)
        arguments = self.shapes[step].arguments(inputs) if self.shapes else inputs
        return model(**placed(arguments, float_dtype(model), clock.step.device))

    def num_batches(self, batch_size: int = 64) -> int:
        return sum(-(-self.num_rows(step) // batch_size) for step in range(self.num_steps))

    def batches(self, batch_size: int = 64) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(step, inputs) in step order, at most batch_size rows at a time."""
        for step, inputs in enumerate(self.per_step):
            for start in range(0, self.num_rows(step), batch_size):
                yield step, {name: tensor[start : start + batch_size] for name, tensor in inputs.items()}


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
    if n < 1:
        raise UserError(f"calibration.n must be at least 1, got {n}")
    wanted = conditions_for_calibration(model, n, seed, prompts)
    key = canonical_sha256(
        {
            "model": model.fingerprint,
            "sampler": vars(sampler),
            "n": n,
            "seed": seed,
            "prompts": [prompt.text for prompt in wanted.prompts],
            "batch_size": batch_size,
            "device": str(device),
            "code": code_identity(),
        }
    )
    device = torch.device(device)
    path = None if cache is None else cache / "calibration" / key / "inputs.safetensors"
    if path is not None and (kept := cached(path, _read)) is not None:
        per_step, shapes, silent = kept
        return Calibration(per_step, key, shapes, path.parent, device, {"calibration": saved_seconds(path)}, silent)

    start_time = perf_counter()
    steps: list[list[tuple[dict[str, Tensor], Shape]]] = [[] for _ in range(sampler.steps)]
    transformer = float_copy(model.target(), dtype=getattr(torch, model.spec.dtype), device=device)
    bar = progress_bar(total=sampler.steps * -(-n // batch_size), desc="calibrate")
    with torch.no_grad(), unreached(transformer) as left, bar as progress:

        def record(step: int, arguments: dict[str, Any]) -> None:
            rows, shape = take_apart(arguments, len(arguments["hidden_states"]), model.adapter.SHARED)
            cpu = {name: tensor.cpu() for name, tensor in shape.shared.items()}
            steps[step].append(
                ({name: tensor.cpu().clone() for name, tensor in rows.items()}, replace(shape, shared=cpu))
            )
            progress.update()

        for start in range(0, n, batch_size):
            part = wanted.rows(start, min(start + batch_size, n))
            model.adapter.sample(model.pipe, transformer, part, sampler, on_call=record, decode=False)
    per_step = tuple({name: torch.cat([rows[name] for rows, _ in calls]) for name in calls[0][0]} for calls in steps)
    shapes = tuple(calls[0][1] for calls in steps)
    if not all(tensor.isfinite().all() for tensor in per_step[-1].values()):
        raise UserError(
            f"model {model.spec.name}: NaN in the float model's own samples; check the checkpoint and sampler"
        )
    check_fused(transformer, left)
    silent = tuple(sorted(left))
    if path is not None:
        _write(path, per_step, shapes, silent, perf_counter() - start_time)
    return Calibration(per_step, key, shapes, None if path is None else path.parent, device, unreached=silent)


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
    per_step = tuple(
        {name: tensor[rows] for name, tensor in inputs.items()}
        for inputs, rows in zip(calibration.per_step, rows_of_step, strict=True)
    )
    key = canonical_sha256({"of": calibration.key, "chosen": chosen})
    return Calibration(
        per_step, key, calibration.shapes, None, calibration.device, calibration.saved_s, calibration.unreached
    )


def spread(length: int, wanted: int) -> Tensor:
    """At most `wanted` indices below length, evenly spread, int64."""
    return torch.linspace(0, length - 1, min(wanted, length)).round().long().unique()


def saved_seconds(path: Path) -> float:
    """What it took to make a cached file, so that a run that finds it does not look cheaper than it is."""
    with safe_open(path, framework="pt") as file:
        return float((file.metadata() or {}).get(SECONDS, 0.0))


SHARED, SHAPES, UNREACHED = "shared:", "shapes", "unreached"  # in the file: prefix of tensors without rows; metadata


def _write(
    path: Path,
    per_step: tuple[dict[str, Tensor], ...],
    shapes: tuple[Shape, ...],
    silent: tuple[str, ...],
    seconds: float,
) -> None:
    flat = {f"{s:04d}/{n}": t.contiguous() for s, inputs in enumerate(per_step) for n, t in inputs.items()}
    for step, shape in enumerate(shapes):
        flat |= {f"{step:04d}/{SHARED}{n}": t.contiguous().clone() for n, t in shape.shared.items()}
    metadata = {SECONDS: f"{seconds:.6f}", SHAPES: json.dumps([shape.tree for shape in shapes])}
    metadata |= {UNREACHED: json.dumps(silent)}
    with atomic_path(path) as part:
        save_file(flat, part, metadata=metadata)


def _read(path: Path) -> tuple[tuple[dict[str, Tensor], ...], tuple[Shape, ...], tuple[str, ...]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    trees, silent = json.loads(metadata[SHAPES]), tuple(json.loads(metadata[UNREACHED]))
    rows: list[dict[str, Tensor]] = [{} for _ in trees]
    shapes = [Shape(tree) for tree in trees]
    for key, tensor in load_file(path).items():
        step, name = key.split("/", 1)
        shared = name.startswith(SHARED)
        (shapes[int(step)].shared if shared else rows[int(step)])[name.removeprefix(SHARED)] = tensor
    return tuple(rows), tuple(shapes), silent
