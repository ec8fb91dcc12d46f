"""Layers of a model of true size are timed by a part of their outputs: the plan takes seconds, and its rates are those of the part."""

from __future__ import annotations

from collections import Counter

import pytest

from ditbench.harness.models.counts import Counts
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep import rates
from ditbench.harness.sweep.compose import composed

LARGE, SMALL = (4608, 6144, 55296), (512, 1024, 300)  # FLUX.2's largest layer, and one of less than the most
OF_IT = rates.WEIGHTS // 6144
ONE_S = 1.0


@pytest.fixture
def made(monkeypatch):
    """Sizes of what is timed, each in one second: no product is computed, and no weight drawn."""
    sizes: list[tuple[int, int]] = []

    def noise(rows, columns, dtype, device):
        sizes.append((rows, columns))

    def one_layer(config, bits, inputs, outputs):
        sizes.append((outputs, inputs))

    monkeypatch.setattr(rates, "_noise", noise)
    monkeypatch.setattr(rates, "_one_layer", one_layer)
    monkeypatch.setattr(rates, "_best", lambda call, device: ONE_S)
    monkeypatch.setattr(rates, "kind_of", lambda layer, compiled: "measured")
    return sizes


def probed() -> rates.Rates:
    config = parse(composed([["model=tiny-dit", "bits=w4a8", "tracker=none"]])[0])
    counts = Counts(call_macs=10**15, shapes=Counter({LARGE: 48, SMALL: 1}))
    return rates.probed(config, skeleton(config.model), counts)


def test_no_layer_that_is_timed_has_more_than_eight_million_weights(made):
    probed()
    weights = [rows * columns for rows, columns in made if rows != rates.ROWS]
    assert max(weights) == OF_IT * 6144 <= 2**23, "all of FLUX.2's largest layer is 340 million"
    assert SMALL[1] * SMALL[2] in weights, "a small one is timed whole"


def test_the_rates_are_of_the_part_that_was_timed(made):
    found = probed()
    macs = rates.ROWS * (6144 * OF_IT + SMALL[1] * SMALL[2])
    expected = macs / (2 * ONE_S) / rates.BESIDE_LAYERS
    assert found.quantized_macs_s == expected and set(found.float_macs_s.values()) == {expected}


def test_building_is_scaled_up_to_all_weights_of_all_layers(made, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    every = 48 * LARGE[1] * LARGE[2] + SMALL[1] * SMALL[2]
    assert probed().build_s == pytest.approx(2.0 * every / (6144 * OF_IT + SMALL[1] * SMALL[2]))
