from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.models.calls import Call
from ditbench.methods import ptq4dm
from ditbench.methods.ptq4dm import Params, draw_steps, select_calibration


def recording(steps: int, rows: int) -> Calibration:
    return Calibration(
        tuple((Call({"timestep": torch.full((rows,), s), "row": torch.arange(rows)}),) for s in range(steps)), "key"
    )


def test_timesteps_are_normal_with_the_tails_at_both_ends():
    """Mean 0.3: most samples late in the denoising. Shares against the normal's distribution function, step by step."""
    steps, params, count = 20, Params(mean=0.3, std=0.25), 40_000
    found = torch.bincount(draw_steps(count, steps, params, torch.Generator().manual_seed(0)), minlength=steps) / count
    normal = NormalDist(0.3 * steps, 0.25 * steps)
    for step in range(steps):
        timestep = steps - 1 - step
        below = 0.0 if timestep == 0 else normal.cdf(timestep - 0.5)
        above = 1.0 if timestep == steps - 1 else normal.cdf(timestep + 0.5)
        assert float(found[step]) == pytest.approx(above - below, abs=0.006)
    assert float(found[-1]) > 0.1 > 0.01 > float(found[0])


def test_calibration_has_as_many_rows_at_each_step_as_were_drawn():
    whole, params = recording(20, 64), Params(samples=1000)
    chosen = select_calibration(whole, params, seed=5)
    drawn = draw_steps(1000, 20, params, torch.Generator().manual_seed(5))
    assert [len(i["row"]) for i in chosen.per_step] == torch.bincount(drawn, minlength=20).tolist()
    assert all(bool((inputs["timestep"] == step).all()) for step, inputs in enumerate(chosen.per_step))
    uses = torch.bincount(torch.cat([inputs["row"] for inputs in chosen.per_step]))
    assert len(uses) == 64 and set(uses.tolist()) == {15, 16}
    assert chosen.key != whole.key and chosen.cache is None


def test_a_short_recording_gives_as_many_rows_as_it_has_in_all():
    chosen = select_calibration(recording(4, 6), Params(), seed=0)
    assert sum(len(inputs["row"]) for inputs in chosen.per_step) == 24


def test_the_choice_depends_on_the_seed_alone():
    whole, random_state = recording(20, 16), torch.get_rng_state()
    first, second, other = (select_calibration(whole, Params(), seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a["row"], b["row"]) for a, b in zip(first.per_step, second.per_step, strict=True))
    assert [len(a["row"]) for a in first.per_step] != [len(b["row"]) for b in other.per_step]
    assert first.key == second.key != other.key


@pytest.mark.parametrize("bits", [DYNAMIC, STATIC.with_widths(4, 8)], ids=["dynamic", "static"])
def test_reconstruction_with_drops_brings_the_output_closer_to_float(bits, small_target, small_calibration):
    chosen, errors = select_calibration(small_calibration, Params(), 0), {}
    for params in (Params(reconstruct="none"), Params(iterations=60)):
        state = ptq4dm.fit(small_target, chosen, bits, params)
        built = build(small_target, ptq4dm.apply(small_target, state, bits, params), dtype=torch.float32)
        exact = float_copy(small_target, dtype=torch.float32)
        errors[params.reconstruct] = 0.0
        with torch.no_grad():
            for inputs in small_calibration.per_step:
                errors[params.reconstruct] += float((built(**inputs).sample - exact(**inputs).sample).square().sum())
    assert errors["block"] < 0.8 * errors["none"], errors


def test_half_the_elements_are_dropped_unless_told_otherwise(small_target, small_calibration):
    params = Params(iterations=10)
    assert (params.input_prob, params.act_prob) == (0.5, 0.5)
    with_drops, without = (
        ptq4dm.fit(small_target, small_calibration, DYNAMIC, p)
        for p in (params, replace(params, input_prob=1.0, act_prob=1.0))
    )
    assert any(not torch.equal(with_drops[name], without[name]) for name in with_drops)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 1.5}, r"mean must be in \[0, 1\]"),
        ({"std": -0.1}, "std ≥ 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"ranges": "shrink"}, "mse or minmax, got 'shrink'"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
