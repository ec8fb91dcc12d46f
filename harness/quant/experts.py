"""Experts by noise level: several transformers of one class, of which each denoises its own range of steps (Wan 2.2), as one model.

The harness sees one transformer, whose layers are `<expert>.<layer>`: loading, counting, building, sampling and accounting know of no
experts. Methods see none either: each expert is fitted alone, as a model whose sampler makes that expert's steps only
(`within`), and `placed` puts its recipe where the expert is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import AdaLNRows, Producer, Site, TableRows, Target, ValueRows

T = TypeVar("T")
FIRST, SECOND = "transformer", "transformer_2"  # as diffusers calls them: high noise, low noise


class Experts(nn.Module):
    """Calls `transformer` at timesteps from `boundary_timestep` on, `transformer_2` below it, as diffusers' pipelines do."""

    transformer: Any  # models of diffusers, which know their config, dtype and device
    transformer_2: Any

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary_timestep: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary_timestep = boundary_timestep
        both = (getattr(each, "_keep_in_fp32_modules", None) or () for each in (transformer, transformer_2))
        self._keep_in_fp32_modules = sorted({name for names in both for name in names})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Raises ValueError: the rows of one call belong to different experts."""
        return self.get_submodule(self.chosen(timestep))(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_image=encoder_hidden_states_image,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
        )

    @torch._disable_dynamo  # reads a value; torch.compiler.disable would import the whole compiler here
    def chosen(self, timestep: Tensor) -> str:
        """The name of the expert that denoises at this timestep, of any shape; one without a value (`meta`) is the first's, whose
        shapes are the second's.
        """
        if timestep.is_meta:
            return FIRST
        high = timestep >= self.boundary_timestep
        if bool(high.any()) != bool(high.all()):
            raise ValueError(f"the rows of a call have timesteps on both sides of {self.boundary_timestep:g}")
        return FIRST if bool(high.all()) else SECOND

    def steps_of(self, timesteps: Iterable[float]) -> dict[str, range]:
        """Which steps each expert makes of a sampler's, in sampling order; none, perhaps."""
        timesteps = list(timesteps)
        first = sum(timestep >= self.boundary_timestep for timestep in timesteps)
        return {FIRST: range(first), SECOND: range(first, len(timesteps))}

    # What pipelines ask of a transformer.

    @property
    def config(self) -> Any:
        """The first expert's, which is the second's too, and where they part."""
        config = self.transformer.config
        return type(config)({**config, "boundary_timestep": self.boundary_timestep})

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def cache_context(self, name: str, **more: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def experts_in(pipe: Any) -> Experts | None:
    """The two transformers of a diffusers pipeline that share its steps; None: it has no two, or they share no steps."""
    second, ratio = getattr(pipe, SECOND, None), pipe.config.get("boundary_ratio")
    if second is None or ratio is None:
        return None
    return Experts(pipe.transformer, second, ratio * pipe.scheduler.config.num_train_timesteps)


def experts_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """{name: expert}; of a model that has none, itself under no name."""
    if isinstance(transformer, Experts):
        return {name: transformer.get_submodule(name) for name in (FIRST, SECOND)}
    return {"": transformer}


def of_each(transformer: nn.Module, names: Callable[[nn.Module], Iterable[T]]) -> list[T]:
    """What names(expert) gives (names of modules, or sites) of every expert, by its place in the whole."""
    return [put(each, name) for name, expert in experts_of(transformer).items() for each in names(expert)]


def within(target: Target, expert: str) -> Target:
    """What is quantized in one expert, as a model of its own."""
    prefix = f"{expert}."

    def own(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    sites = [site for site in target.sites if site.consumers[0].startswith(prefix)]
    return replace(
        target,
        transformer=target.transformer.get_submodule(expert),
        layers=own(target.layers),
        sites=tuple(renamed(site, lambda name: name.removeprefix(prefix)) for site in sites),
        attention=own(target.attention),
        blocks=own(target.blocks),
        attention_given={name: target.attention_given[prefix + name] for name in own(target.attention_given)},
    )


def put(value: T, expert: str) -> T:
    """A name within an expert, or a site of one, by its place in the whole; as it is where the expert has no name."""
    if not expert:
        return value
    if isinstance(value, Site):
        return renamed(value, lambda name: f"{expert}.{name}")  # type: ignore[return-value]
    return f"{expert}.{value}"  # type: ignore[return-value]


def renamed(site: Site, call: Callable[[str], str]) -> Site:
    """The site with every name that it has changed."""

    def producer(of: Producer) -> Producer:
        if isinstance(of, TableRows):
            return replace(of, block=call(of.block))
        assert isinstance(of, AdaLNRows | ValueRows)
        return replace(of, linear=call(of.linear))

    return Site(
        call(site.name),
        tuple(map(call, site.consumers)),
        tuple(map(producer, site.producers)),
        tuple(tuple(map(call, group)) for group in site.groups),
    )


def placed(recipe: ModelRecipe, expert: str, steps: range, num_steps: int) -> ModelRecipe:
    """The recipe of an expert that was fitted on its own `steps`, for the whole model with its `num_steps`.

    Raises:
        UserError: a recipe whose layers change with the range of steps.
    """
    if recipe.variants:
        raise UserError(f"{expert}: layers that change with the range of steps cannot be put beside another expert's")
    # At the others' steps nobody looks.
    spread = _Spread(torch.arange(num_steps).clamp(steps.start, steps.stop - 1) - steps.start)
    own = recipe if recipe.num_steps is None else replace(recipe, num_steps=num_steps)
    return replace(
        own,
        layers={f"{expert}.{name}": spread(layer) for name, layer in recipe.layers.items()},
        folded=frozenset(f"{expert}.{name}" for name in recipe.folded),
        attention={f"{expert}.{name}": spread(each) for name, each in recipe.attention.items()},
    )


def side_by_side(recipes: Sequence[ModelRecipe]) -> ModelRecipe:
    """Recipes of different parts of one model as one. num_steps: of those whose tables depend on the step."""
    steps = {recipe.num_steps for recipe in recipes} - {None}
    assert len(steps) <= 1, "`placed` made them for one sampler"
    return ModelRecipe(
        layers={name: layer for recipe in recipes for name, layer in recipe.layers.items()},
        folded=frozenset().union(*(recipe.folded for recipe in recipes)),
        attention={name: each for recipe in recipes for name, each in recipe.attention.items()},
        num_steps=next(iter(steps), None),
    )


class _Spread:
    """Parts of a recipe with their tables over more steps. What was one object in several layers is one again: folds rest on it.

    index_S[s]: the fitted step whose row step s has.
    """

    def __init__(self, index_S: Tensor) -> None:
        self.index_S = index_S
        self.known: dict[int, tuple[Any, Any]] = {}  # what it was, which keeps its id, and what it became

    def __call__(self, value: T) -> T:
        if id(value) not in self.known:
            self.known[id(value)] = value, self._spread(value)
        return self.known[id(value)][1]

    def _spread(self, value: Any) -> Any:
        if isinstance(value, StepTable):
            of_step = value.group_of_step
            return value if of_step is None else StepTable(value.rows, of_step[self.index_S.to(of_step.device)])
        if isinstance(value, nn.Module):
            tables = [(name, part) for name, part in value.named_modules() if isinstance(part, StepTable)]
            changed = copy.deepcopy(value) if tables else value
            for name, table in tables:
                parent, _, child = name.rpartition(".")
                setattr(changed.get_submodule(parent), child, self(table))
            return changed
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if not is_dataclass(value) or isinstance(value, type):
            return value
        return replace(value, **{each.name: self(getattr(value, each.name)) for each in fields(value) if each.init})
