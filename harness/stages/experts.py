"""Experts by noise level (`quant/experts.py`), quantized one after the other, in the order in which they denoise.

What the second expert gets to see is made by the first. So it is calibrated behind the quantized first one: the sampler runs once more with
that in its place (if the method looks at data), and the second expert's calls of this run are its calibration. Each is fitted alone, by methods that know of
no other, on the steps that it makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.build.build import build
from ditbench.harness.calibration import recording as recordings
from ditbench.harness.calibration.lazy import LazyCalibration
from ditbench.harness.calibration.recording import Calibration, key_of_steps, of_steps
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.quant.experts import Experts, placed, side_by_side, within
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import MixedBits
from ditbench.harness.quant.target import Target
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.states import fitted, key_of, with_attention_given


def steps_of(model: LoadedModel, sampler: Sampler) -> dict[str, range]:
    """{expert: the steps that it makes, in sampling order}. Of a transformer alone, which no scheduler drives, each makes all."""
    assert isinstance(model.transformer, Experts)
    if isinstance(model.pipe, TransformerOnly):
        return dict.fromkeys(model.transformer.steps_of([]), range(sampler.steps))
    return model.transformer.steps_of(model.adapter.timesteps(model.pipe, sampler))  # type: ignore[attr-defined]


def fitted_in_turn(
    config: RunConfig, model: LoadedModel, target: Target, recording: Calibration
) -> tuple[ModelRecipe, dict[str, Tensor]]:
    """The method's recipe of all experts, and its states, `<expert>/<name of the tensor>`.

    recording: of the float model.

    Raises:
        UserError: the method refuses; mixed precision, or a method that corrects the sampler, which know one transformer.
    """
    if isinstance(config.bits, MixedBits):
        raise UserError("bits=mixed shares one budget among the layers of one transformer, and this model has two")
    if registry.correction(config.method, {}, config.params) is not None:
        raise UserError(f"method {config.method} corrects the sampler for one transformer, and this model has two")
    sampler, alone = config.protocol.sampler, isinstance(model.pipe, TransformerOnly)
    recipes: list[ModelRecipe] = []
    made: list[str] = []  # what the recipes so far are made of
    state: dict[str, Tensor] = {}
    for expert, steps in steps_of(model, sampler).items():
        part = within(target, expert)
        if not steps or not part.layers:
            continue
        if alone:
            own = recording
        elif recipes and config.section("calibration")["n"]:
            own = _behind(config, model, target, side_by_side(recipes), made, recording, expert, steps)
        else:
            own = of_steps(recording, steps, expert)
        recipe, learned = fitted(config, part, own, config.bits)
        recipes.append(placed(with_attention_given(part, recipe), expert, steps, sampler.steps))
        made.append(key_of(config, part, own, config.bits))
        state |= {f"{expert}/{name}": tensor for name, tensor in learned.items()}
    return side_by_side(recipes), state


def by_steps(macs: dict[str, int], model: LoadedModel, sampler: Sampler) -> dict[str, int]:
    """Multiply-accumulates of one call of each expert → of all steps of the sampler, "" in all."""
    steps = {expert: len(own) for expert, own in steps_of(model, sampler).items()}
    found = {name: count * steps[name.partition(".")[0]] for name, count in macs.items() if name}
    return found | {"": sum(found[expert] for expert in steps)}


def _behind(
    config: RunConfig,
    model: LoadedModel,
    target: Target,
    recipe: ModelRecipe,
    made: list[str],
    before: Calibration,
    expert: str,
    steps: range,
) -> Calibration:
    """An expert's calls in a sampler that runs with those before it quantized, recorded if the method asks for them.

    recipe: of those before it. made: what that is made of. before: the recording which hears what the cache saves.
    """
    form = config.protocol.attention
    behind = recordings.Behind(
        canonical_sha256([made, config.backend, *([form] if isinstance(form, str) else [])]),
        lambda: build(
            target,
            recipe,
            dtype=getattr(torch, model.spec.dtype),
            device=config.device,
            backend=config.backend,
            memory=config.memory,
        ),
    )
    section = config.section("calibration")
    of, how = (
        (model, config.protocol.sampler, section["n"], config.seed),
        {"batch_size": section["batch_size"], "device": config.device, "prompts": config.calibration_prompts},
    )
    whole = recordings.key_of(*of, **how, behind=behind.made)

    def record() -> Calibration:
        found = recordings.calibrate(*of, **how, cache=config.cache_dir, memory=config.memory, behind=behind)
        before.saved(f"calibration {whole}", sum(found.saved_s.values()))
        return of_steps(found, steps, expert)

    key = key_of_steps(whole, steps, expert)
    return LazyCalibration(  # type: ignore[return-value]
        key, config.cache_dir, record, whole=whole, saved_s=before.saved_s, fits=before.fits
    )
