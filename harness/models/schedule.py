"""The timesteps that a transformer is told at each step of a sampler, found without computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ditbench.harness.build.step_finder import Schedule, noisiest, time_argument
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.calls import float_dtype, placed
from ditbench.harness.models.macs import KnownValues, on_meta
from ditbench.harness.models.parts import replaced
from ditbench.harness.quant.blocks import by_name
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt


@torch.no_grad()
def schedule_of(model: LoadedModel, sampler: Sampler) -> Schedule:
    """By the family's own loop on one sample, with a transformer that answers zeros of the right shape: a schedule depends on the
    sampler and on the size of what is drawn, not on what the transformer says.

    Raises:
        UserError: the transformer has no argument that is known to be the noise level.
    """
    told: dict[int, tuple[str, float]] = {}

    def on_call(step: int, arguments: dict[str, Any]) -> None:
        name = time_argument(arguments)
        if name is None:
            raise UserError(
                f"model {model.spec.name}: which argument of its transformer is the timestep? It has {', '.join(arguments)}"
            )
        told.setdefault(step, (name, noisiest(arguments[name])))

    if model.adapter.CONDITION == PROMPTS:
        one = Conditions((0,), prompts=(Prompt("a red circle"),))
    else:
        one = Conditions((0,), torch.zeros(1, dtype=torch.int64))
    with answering_zeros(model.transformer) as transformer:
        model.adapter.sample(model.pipe, transformer, one, sampler, on_call=on_call, decode=False)
    return Schedule(told[0][0], tuple(told[step][1] for step in range(sampler.steps)))


@contextmanager
def answering_zeros(transformer: nn.Module) -> Iterator[nn.Module]:
    """Inside, the transformer has a clock and answers zeros; shapes are found on `meta`, once for each shape of a call."""
    shapes_only, known = on_meta(transformer), {}

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = by_name(shapes_only, args, kwargs)
        key = repr([leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(arguments)])
        if key not in known:
            try:
                with KnownValues():
                    known[key] = shapes_only(**placed(arguments, float_dtype(transformer), "cpu"))
            except (RuntimeError, TypeError):  # it reads what comes out of its weights: see `count_macs`
                known[key] = original(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), known[key])

    transformer.clock = StepClock(None)  # type: ignore[assignment]
    try:
        with replaced(transformer, "forward", forward):
            yield transformer
    finally:
        del transformer.clock
