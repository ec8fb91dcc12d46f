"""`ditbench check-method`: the questions every method answers, asked of any plugin on a small random DiT.

Is its transform exact before rounding? Is it off at 16 bits? Does its state survive saving and a fresh process? Does it
leave the model and the random state alone? Does it bear a dead channel and a huge outlier? Does it refuse with words?
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditbench.harness.build.build import build
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.calls import placed
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Target

FLOAT_IDENTITY = 1e-10
SMALL_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
DYNAMIC = Bits(QuantSpec(4, "per_channel"), QuantSpec(8, "per_token", dynamic=True))
STATIC = Bits(QuantSpec(8, "per_channel", symmetric=False), QuantSpec(8, "per_tensor", symmetric=False))


@dataclass
class Case:
    """One method on one small model."""

    name: str
    seed: int = 0
    scope: str = "blocks"

    @property
    def module(self) -> ModuleType:
        return registry.method(self.name)

    @cached_property
    def params(self):
        return self.module.Params()

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(ModelSpec("small-random-dit", "dit", random=SMALL_DIT, seed=self.seed))

    @cached_property
    def target(self) -> Target:
        return self.model.target(self.scope)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.model, Sampler("ddim", steps=3, guidance=1.5), n=2, seed=self.seed)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.model.step_inputs(3)

    @cached_property
    def float_output(self) -> Tensor:
        return self.output(self.model.transformer)

    @cached_property
    def bits(self) -> Bits:
        """The first of the two usual formats that the method defines."""
        for bits in (DYNAMIC, STATIC):
            try:
                registry.check_bits(self.name, bits)
                return bits
            except UserError:
                continue
        raise UserError(f"method {self.name!r} defines neither W4A8 dynamic nor W8A8 static; nothing to check it with")

    def fit(self, bits: Bits | None = None) -> dict[str, Tensor]:
        state = self.module.fit(self.target, self.calibration, bits or self.bits, self.params)
        registry.check_state(self.name, state)
        return state

    def recipe(self, bits: Bits | None = None, state: dict[str, Tensor] | None = None) -> ModelRecipe:
        state = self.fit(bits) if state is None else state
        recipe = self.module.apply(self.target, state, bits or self.bits, self.params)
        registry.check_recipe(self.name, recipe, self.target)
        return recipe

    def output(self, model: nn.Module, dtype: torch.dtype = torch.float32, step: int = 1) -> Tensor:
        if hasattr(model, "clock"):
            model.clock.set(step, self.calibration.num_steps)
        with torch.no_grad():
            return model(**placed(self.inputs, dtype, "cpu")).sample


def transforms_are_exact(case: Case) -> None:
    """Before rounding the output is the float model's: relative error < 1e-10 in float64."""
    reference = case.output(copy.deepcopy(case.model.transformer).double(), torch.float64)
    unrounded = build(case.target, case.recipe().without_rounding(), dtype=torch.float64)
    for step in range(case.calibration.num_steps):
        error = relative_error(case.output(unrounded, torch.float64, step), reference)
        expect(error < FLOAT_IDENTITY, f"step {step}: relative error {error:.1e}, expected < {FLOAT_IDENTITY:.0e}")


def sixteen_bits_change_nothing(case: Case) -> None:
    """With both sides in float the output is the float model's to float rounding."""
    try:
        registry.check_bits(case.name, Bits(None, None))
    except UserError:
        return
    error = relative_error(
        case.output(build(case.target, case.recipe(Bits(None, None)), dtype=torch.float32)), case.float_output
    )
    expect(error < 1e-4, f"relative error {error:.1e} at W16A16, expected < 1e-4")


def eight_bits_come_close(case: Case) -> None:
    """At 8 bits the output is finite and within 20 % of the float model's."""
    for bits in (DYNAMIC.with_widths(8, 8), STATIC):
        try:
            registry.check_bits(case.name, bits)
        except UserError:
            continue
        output = case.output(build(case.target, case.recipe(bits), dtype=torch.float32))
        expect(bool(output.isfinite().all()), f"{bits.label}: the output is not finite")
        error = relative_error(output, case.float_output)
        expect(error < 0.2, f"{bits.label}: relative error {error:.2f}, expected < 0.2")


def state_survives_a_fresh_process(case: Case) -> None:
    """The state is tensors by name; saved, and applied in another process, it gives the same output bit for bit."""
    state = case.fit()
    here = case.output(build(case.target, case.recipe(state=state), dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {n: t.contiguous() for n, t in state.items()} | {"": torch.zeros(1)}, Path(folder) / "state.safetensors"
        )
        code = (
            f"import sys; from {__name__} import apply_saved; "
            "apply_saved(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])"
        )
        arguments = [case.name, folder, str(case.seed), case.scope]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        expect(done.returncode == 0, f"the fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
        there = load_file(Path(folder) / "output.safetensors")["output"]
    expect(torch.equal(here, there), f"outputs differ by up to {(here - there).abs().max():.1e} after saving")


def apply_saved(name: str, folder: str, seed: int, scope: str) -> None:
    """The other half of `state_survives_a_fresh_process`: state.safetensors → output.safetensors."""
    state = load_file(Path(folder) / "state.safetensors")
    state.pop("")
    case = Case(name, seed, scope)
    output = case.output(build(case.target, case.recipe(state=state), dtype=torch.float32))
    save_file({"output": output.contiguous()}, Path(folder) / "output.safetensors")


def model_and_random_state_are_left_alone(case: Case) -> None:
    """fit and apply change neither the model nor the global random state."""
    before, random_state = tensors_sha256(case.model.transformer.state_dict()), torch.get_rng_state()
    build(case.target, case.recipe(), dtype=torch.bfloat16)
    expect(tensors_sha256(case.model.transformer.state_dict()) == before, "the model passed in was changed")
    expect(torch.equal(torch.get_rng_state(), random_state), "the global random state was changed; use a Generator")


def fitting_twice_is_the_same(case: Case) -> None:
    """The same calibration gives the same state bit for bit."""
    expect(tensors_sha256(case.fit()) == tensors_sha256(case.fit()), "two fits on the same calibration differ")


def ugly_channels_are_borne(case: Case) -> None:
    """A dead channel and one a thousand times too large: still exact before rounding, finite after."""
    ugly = Case(case.name, case.seed + 1, case.scope)
    for site in ugly.target.sites:
        if site.modulated:
            producer = ugly.model.transformer.get_submodule(site.producers[0].linear)
            first, second = site.producers[0].shift_rows.start, site.producers[0].scale_rows.start
            for rows, offset in ((first, 0.0), (second, -1.0)):  # β = 0 and γ = −1: the channel is always 0
                producer.weight[rows], producer.bias[rows] = 0.0, offset
            producer.bias[first + 1] = 1000.0
    transforms_are_exact(ugly)
    output = ugly.output(build(ugly.target, ugly.recipe(), dtype=torch.float32))
    expect(bool(output.isfinite().all()), "the output is not finite with a dead and a huge channel")


def every_layer_is_accounted_for(case: Case) -> None:
    """Each layer has both sides quantized, or the method says it leaves it in float (no silent skips)."""
    if case.name == registry.FLOAT:
        return
    recipe = case.recipe()
    found = {n: recipe.layers.get(n) for n in case.target.layers}
    sides = [("weight", case.bits.weight), ("act", case.bits.act)]
    left = [n for n, layer in found.items() for side, spec in sides if spec and getattr(layer, side, None) is None]
    allowed = getattr(case.module, "LEAVES_IN_FLOAT", "")
    silent = [n for n in left if not (allowed and re.search(allowed, n))]
    expect(not silent, f"left in float without saying so (LEAVES_IN_FLOAT): {', '.join(silent[:3])}")


CHECKS: tuple[Callable[[Case], None], ...] = (
    transforms_are_exact,
    sixteen_bits_change_nothing,
    eight_bits_come_close,
    state_survives_a_fresh_process,
    model_and_random_state_are_left_alone,
    fitting_twice_is_the_same,
    ugly_channels_are_borne,
    every_layer_is_accounted_for,
)


class Nonconforming(AssertionError):
    """A check found the method wanting."""


def check_methods(name: str) -> int:
    """Run every check and print one line each → exit code (0, or 1 when one failed)."""
    names = list(registry.known_methods()) if name == "all" else [name]
    failed = 0
    for each in names:
        registry.method(each)
        print(f"{each}: {registry.summary(each)}")
        case = Case(each)
        for check in CHECKS:
            what = (check.__doc__ or "").split("\n")[0]
            try:
                check(case)
                print(f"  ok    {what}")
            except Exception as error:
                failed += 1
                said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                print(f"  FAIL  {what}\n        {said}")
    return 1 if failed else 0


def relative_error(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference.double()).norm() / reference.double().norm())


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Nonconforming(message)
