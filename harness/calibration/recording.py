"""Calibration: one pass of the float model's sampler, recorded once, kept on disk under the hash of what made it.

It is written while it is recorded and read by step and rows: neither holds more than a few calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of, float_copy
from ditbench.harness.build.offload import RESIDENT
from ditbench.harness.calibration.on_disk import ChosenRows, TensorFiles
from ditbench.harness.calibration.reached import check_fused, unreached
from ditbench.harness.calibration.recorder import Recorder, read
from ditbench.harness.common.artifacts import Address, filled
from ditbench.harness.common.batches import in_batches
from ditbench.harness.common.code_identity import RECORDING, code_identity
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, read_json, tensors_sha256, write_json
from ditbench.harness.common.memory import PeakMemory
from ditbench.harness.common.progress import progress as progress_bar
from ditbench.harness.common.scratch import Scratch
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.batch_sizes import batch_of, rows_by_tokens, tokens_of_row
from ditbench.harness.models.calls import FEW, MORE, Call, float_dtype, placed, row_dims, side_by_side
from ditbench.harness.models.encoded_prompts import keeping
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.samples.seeds import sample_seeds

KIND = "recording"  # of artifact
BATCH = "batch.json"  # what a recording was drawn with
MOST = 32  # samples of a batch that is found
MOST_ROWS = 64  # of a batch that is read
MEASURED = 1  # samples are recorded in any case: layers, kernels and what the sampler reaches are looked at on them


class Behind(NamedTuple):
    """A transformer that samples in the float model's place while it is recorded. made: a hash of all that makes it."""

    made: str
    build: Callable[[], nn.Module]


class Estimate(NamedTuple):
    """What a transformer gives, in the form of diffusers' outputs: by name or by place."""

    sample: Tensor


@dataclass(frozen=True)
class Calibration:
    """The transformer's calls at every denoising step.

    steps[s]: the calls of step s as they were made, each with its own shapes, the steps in sampling order (high noise
    first). With guidance there are conditional and unconditional rows, in one call or in two, in the family's order. A row
    of a step counts through its calls; calls that are alike are put side by side when they are read. Rows lie on disk, and
    are read when they are picked. `key` says what it is; `cache` is where that which is derived from it is kept (None: nowhere).
    unreached: linear layers that no call of the sampler reached. whole: of a part of a recording (`selected`), the whole's key.
    """

    steps: tuple[tuple[Call, ...], ...]
    key: str
    cache: Path | None = None
    device: torch.device = torch.device("cpu")  # where models that are observed on it run
    saved_s: dict[str, float] = field(default_factory=dict, compare=False)  # seconds that the cache saved, by what
    unreached: tuple[str, ...] = ()
    whole: str | None = None
    batch: dict[str, Any] = field(default_factory=dict, compare=False)  # as drawn; `rows` to read at once
    fits: dict[str, PeakMemory] = field(default_factory=dict, compare=False)  # of states that the cache held

    def derived(self, kind: str, key: str, title: str) -> Address | None:
        """Where what is made from it is kept; None: nowhere."""
        return self.cache and Address(self.cache, kind, key, title, {KIND: self.whole or self.key})

    def saved(self, what: str, seconds: float) -> None:
        """Note what the cache saved. What this run has made itself it may find again: that saves nothing."""
        self.saved_s.setdefault(what, seconds)

    def with_own_notes(self) -> Calibration:
        """The same, for one that wants to know what the cache saved *it*."""
        return replace(self, saved_s={})

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def per_step(self) -> tuple[Call, ...]:
        """All rows of each step as one call, read when its arguments are asked for: of models whose calls are alike.

        Raises:
            UserError: those of a step are not.
        """
        found = [alike(calls) for calls in self.steps]
        if any(len(groups) != 1 for groups in found):
            raise UserError(
                "this model's calls of one step differ in their shapes; read the recording by rows or batches"
            )
        return tuple(gathered(groups[0], torch.arange(sum(call.num_rows for call in groups[0])))[0] for groups in found)

    @property
    def rows_at_once(self) -> int:
        """Rows of a call that is read, unless fewer are asked for: of tokens alone, so that nothing learned depends on memory."""
        return self.batch.get("rows", MOST_ROWS)

    def num_rows(self, step: int) -> int:
        return sum(call.num_rows for call in self.steps[step])

    def rows(self, step: int, wanted: int) -> list[Call]:
        """At most `wanted` rows of a step, evenly spread, so that conditional and null rows are both seen, in calls of at most
        `rows_at_once`.
        """
        kept = spread(self.num_rows(step), wanted)
        starts = [(call, range(0, call.num_rows, self.rows_at_once)) for call in picked(self.steps[step], kept)]
        return [call.pick(slice(start, start + self.rows_at_once)) for call, each in starts for start in each]

    def call(self, model: nn.Module, step: int, inputs: Call | Sequence[Call]) -> Any:
        """What a built model (`build`, with its clock) gives for some rows of a step, in its own dtype, on its own device:
        its output, whose `sample` has one row for each. Calls of several shapes are made one after the other.
        """
        clock, dtype = clock_of(model), float_dtype(model)
        clock.set(step, self.num_steps)
        calls = [inputs] if isinstance(inputs, Call) else inputs
        return joined([model(**placed(call.arguments(), dtype, clock.step.device)) for call in calls])

    def num_batches(self, batch_size: int | None = None) -> int:
        batch_size = batch_size or self.rows_at_once
        sizes = [sum(call.num_rows for call in group) for calls in self.steps for group in alike(calls)]
        return sum(-(-size // batch_size) for size in sizes)

    def batches(self, batch_size: int | None = None, steps: Iterable[int] | None = None) -> Iterator[tuple[int, Call]]:
        """(step, inputs) in step order, at most batch_size rows of one shape at a time (None: rows_at_once); steps: all, or some."""
        batch_size = batch_size or self.rows_at_once
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
    batch_size: int | str = 64,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    prompts: Sequence[Prompt] = (),
    memory: str = RESIDENT,
    behind: Behind | None = None,
) -> Calibration:
    """Record n samples with classes drawn at random (or with the model's calibration prompts), or find the recording of
    the same arguments in the cache. Without a cache it lies in a temporary folder for as long as it is used.

    n = 0 records one sample, for what is measured on recorded calls; methods then get `without_data` of it.
    behind: what samples instead of the float model. batch_size: or "auto" (`batch_of`, MOST at most). What does not fit into memory is halved; `Calibration.batch` says what was used.

    Raises:
        UserError: n < 0, one sample does not fit into memory, or the model produces NaN.
    """
    made = behind and behind.made
    key = key_of(model, sampler, n, seed, batch_size=batch_size, device=device, prompts=prompts, behind=made)
    device = torch.device(device)

    def fill(folder: Path) -> None:
        wanted = conditions_for_calibration(model, max(n, MEASURED), seed, prompts)
        _record(model, sampler, wanted, batch_size, device, folder, memory, cache, behind and behind.build)

    if cache is None:
        scratch = Scratch(None)
        fill(scratch.folder)
        steps, silent = read(scratch.folder, owner=scratch)
        return Calibration(steps, key, None, device, unreached=silent, batch=read_json(scratch.folder / BATCH))
    address = Address(cache, KIND, key, f"the recording of {model.spec.name}")
    kept = filled(address, fill, lambda folder: (*read(folder), read_json(folder / BATCH)))
    steps, silent, batch = kept.value
    return Calibration(steps, key, cache, device, {"calibration": kept.saved_s}, silent, batch=batch)


def key_of(
    model: LoadedModel,
    sampler: Sampler,
    n: int,
    seed: int,
    *,
    batch_size: int | str = 64,
    device: torch.device | str = "cpu",
    prompts: Sequence[Prompt] = (),
    behind: str | None = None,
) -> str:
    """The key of what `calibrate` makes of the same arguments (behind: `Behind.made`); nothing is made.

    Raises:
        UserError: n < 0, or a model that is told by prompts has none.
    """
    if n < 0:
        raise UserError(f"calibration.n must be at least 0, got {n}")
    wanted = conditions_for_calibration(model, max(n, MEASURED), seed, prompts)
    key = canonical_sha256(
        {
            "model": model.fingerprint,
            "size": model.spec.size,
            "dtype": model.spec.dtype,
            "sampler": vars(sampler),
            "n": n,
            "seed": seed,
            "prompts": [prompt.text for prompt in wanted.prompts],
            "batch_size": batch_size,
            "device": torch.device(device).type,
            "code": code_identity(*RECORDING),
        }
    )
    return key if behind is None else canonical_sha256({"of": key, "behind": behind})


def _record(
    model: LoadedModel,
    sampler: Sampler,
    wanted: Conditions,
    batch_size: int | str,
    device: torch.device,
    folder: Path,
    memory: str,
    cache: Path | None,
    behind: Callable[[], nn.Module] | None,
) -> None:
    """Sample in float (or with what stands in its place), and write the transformer's calls into the folder."""
    recorder = Recorder(
        sampler.steps,
        row_dims(model.step_inputs(FEW, device), model.step_inputs(MORE, device), model.adapter.ROWS),
        TensorFiles(folder),
    )
    if behind is None:
        transformer = float_copy(model.target(), dtype=getattr(torch, model.spec.dtype), device=device, memory=memory)
    else:
        transformer = behind()
    batch = batch_of(batch_size, model, transformer, most=MOST)
    rows_at_once = rows_by_tokens(tokens_of_row(model, transformer), MOST_ROWS)
    bar = progress_bar(total=sampler.steps * len(wanted), desc="calibrate", unit="img·step")
    texts = [prompt.text for prompt in wanted.prompts]
    with torch.no_grad(), unreached(transformer) as left, bar as progress, keeping(model.pipe, texts, cache):

        def sample(rows: range) -> None:
            mark = recorder.mark()

            def record(step: int, arguments: Mapping[str, Any]) -> None:
                recorder(step, arguments)
                progress.at(rows.start * sampler.steps + (step + 1) * len(rows))

            try:
                part = wanted.rows(rows.start, rows.stop)
                model.adapter.sample(model.pipe, transformer, part, sampler, on_call=record, decode=False)
            except Exception:
                recorder.back_to(mark)
                raise

        for _ in in_batches(range(len(wanted)), batch, sample, what="calibrate", device=device):
            pass
    recorder.finish(sorted(left))
    write_json(folder / BATCH, batch.note() | {"rows": rows_at_once})
    steps, _ = read(folder)
    if not all(tensor.isfinite().all() for call in steps[-1] for tensor in call.tensors()):
        raise UserError(
            f"model {model.spec.name}: NaN in the float model's own samples; check the checkpoint and sampler"
        )
    check_fused(transformer, left)


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
    """Some rows of each step (none, or one several times, is allowed), read when they are picked; `chosen` says which, and
    is part of the key, as the rows are.
    """
    steps = tuple(tuple(gathered(calls, rows)) for calls, rows in zip(calibration.steps, rows_of_step, strict=True))
    rows = tensors_sha256({str(step): rows for step, rows in enumerate(rows_of_step)})
    key = canonical_sha256({"of": calibration.key, "chosen": chosen, "rows": rows})
    return replace(calibration, steps=steps, key=key, whole=calibration.whole or calibration.key)


def of_steps(calibration: Calibration, steps: range, chosen: str) -> Calibration:
    """Some steps, counted from 0, as the recording of a sampler that makes no others; `chosen` says whose they are."""
    kept = tuple(calibration.steps[step] for step in steps)
    key = key_of_steps(calibration.key, steps, chosen)
    return replace(calibration, steps=kept, key=key, whole=calibration.whole or calibration.key)


def key_of_steps(key: str, steps: range, chosen: str) -> str:
    """The key of what `of_steps` makes of a recording with this key."""
    return canonical_sha256({"of": key, "chosen": chosen, "steps": [steps.start, steps.stop]})


@dataclass(frozen=True)
class WithoutData(Calibration):
    """What a method is given where calibration.n is 0: how many steps there are, and nothing that a layer reads.

    Raises:
        UserError: whenever data is asked for; `who` asked.
    """

    who: str = ""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            f"{self.who} looks at what layers read, and calibration.n=0 leaves it the weights only; set calibration.n to at least "
            "1 (docs/methods.md says what can be done without data)"
        )

    derived = rows = call = num_rows = num_batches = batches = _refuse  # type: ignore[assignment]
    per_step = property(_refuse)  # type: ignore[assignment]


def without_data(calibration: Calibration, who: str) -> WithoutData:
    """who: the method, and what else decides whether it needs data."""
    values = {name: getattr(calibration, name) for name in ("key", "cache", "device", "saved_s", "unreached")}
    return WithoutData(steps=((),) * calibration.num_steps, who=who, **values)


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


def gathered(calls: Sequence[Call], kept: Tensor) -> list[Call]:
    """Rows of a step, counted through its calls: in the order asked for, one call for all that are alike, some perhaps empty.
    They are read when they are picked.
    """
    ends = torch.tensor([call.num_rows for call in calls]).cumsum(0)
    owner_N = torch.searchsorted(ends, kept, right=True)
    found = []
    for group in _alike(calls):
        mine = torch.isin(owner_N, torch.tensor(group)).nonzero().flatten()
        part_N = torch.searchsorted(torch.tensor(group), owner_N[mine])
        starts = torch.tensor([int(ends[place]) - calls[place].num_rows for place in group])
        row_N = kept[mine] - starts[part_N]
        first = calls[group[0]]
        rows = {path: ChosenRows([calls[place].rows[path] for place in group], part_N, row_N) for path in first}
        found.append(Call(rows, first.shape))
    return found


def picked(calls: Sequence[Call], kept: Tensor) -> list[Call]:
    """The same, read."""
    return [call.pick(slice(None)) for call in gathered(calls, kept)]


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
