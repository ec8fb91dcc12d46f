"""The "95 %" intervals cover: what the simulation on real digits recorded, and a small one of it here (bench/intervals.py)."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH, RESULTS = ROOT / "bench", ROOT / "results" / "intervals"
MUST_COVER = ("FID", "KID", "IS", "precision", "recall", "PSNR", "share (recognised)", "share (leans left)")


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("intervals", BENCH / "intervals.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["intervals"] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["intervals"]


@pytest.fixture(scope="module")
def world(simulation):
    return simulation.world()


def recorded():
    with_numbers = []
    for path in sorted(RESULTS.glob("coverage-*.csv")):
        with path.open() as file:
            with_numbers += list(csv.DictReader(file))
    return with_numbers


@pytest.mark.parametrize(("design", "model"), [("balanced", "noisy digits"), ("independent", "digits")])
def test_intervals_of_64_digits_are_as_wide_as_fresh_draws_vary_and_cover(simulation, world, design, model):
    rows = {row["metric"]: row for row in simulation.simulate(world, 64, design, model, draws=40, truth=40)}
    assert set(MUST_COVER) <= set(rows)
    for name, row in rows.items():
        if row["sd"] < 1e-9:  # every digit is recognised: nothing varies
            continue
        assert 0.6 < row["sd_estimated"] / row["sd"] < 1.8, (name, row)
        assert row["coverage"] >= (0.65 if name == "FD∞" else 0.8), (name, row)


def test_what_is_called_exact_is_the_mean_of_many_draws(simulation, world):
    random = np.random.default_rng(0)
    drawn = [simulation.drawn(world.labels_N, 64, "balanced", random) for _ in range(30)]
    numbers = [simulation.Numbers(world, "noisy digits", *each, seed) for seed, each in enumerate(drawn)]
    for name, truth in numbers[0].exact().items():
        values = np.array([each.interval(name)[0] for each in numbers])
        off = 4 * values.std() / np.sqrt(30) + (0.5 * truth if name == "FD∞" else 0)
        assert abs(values.mean() - truth) <= off, (name, values.mean(), truth)


def test_labels_that_are_balanced_come_in_turn_and_make_the_strata(simulation, world):
    chosen_N, strata_N = simulation.drawn(world.labels_N, 23, "balanced", np.random.default_rng(0))
    assert world.labels_N[chosen_N].tolist() == strata_N.tolist() == [index % 10 for index in range(23)]
    _, strata_N = simulation.drawn(world.labels_N, 23, "independent", np.random.default_rng(0))
    assert not strata_N.any()


@pytest.mark.parametrize(
    "row", recorded(), ids=lambda row: f"{row['metric']} {row['n']} {row['design']} {row['model']}"
)
def test_recorded_intervals_cover_between_90_and_98_times_in_100(row):
    if float(row["sd"]) < 1e-9:
        return
    low, high = EXCEPT.get((row["metric"], row["n"], row["design"], row["model"]), (0.90, 0.98))
    assert low <= float(row["coverage"]) <= high


def floors():
    with (RESULTS / "noise_floor.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", floors(), ids=lambda row: f"{row['metric']} {row['n']} {row['worse share']}")
def test_at_most_7_of_100_equal_models_are_outside_the_recorded_noise_floor(row):
    if float(row["worse share"]) == 0:
        assert float(row["pairs, one seed"]) <= 0.07 and float(row["pairs, three seeds"]) <= 0.07
        assert float(row["range of three seeds"]) > 0.07, "what it was"
    else:
        assert float(row["effect"]) > 0.2


# (lowest, highest) of cells that miss 90 to 98; docs/protocols.md says why. A chance of 95 gives 98.5 or more in one cell of fifty.
NARROW, WIDE, BY_CHANCE = (0.86, 0.98), (0.90, 1.0), (0.90, 0.99)
EXCEPT: dict[tuple[str, str, str, str], tuple[float, float]] = {
    ("FD∞", "64", "balanced", "digits"): NARROW,
    ("IS", "64", "balanced", "digits"): NARROW,
    ("CMMD", "64", "balanced", "digits"): NARROW,
    ("CMMD", "64", "independent", "digits"): NARROW,
    ("CMMD", "256", "independent", "noisy digits"): NARROW,
    ("KID", "1024", "balanced", "digits"): NARROW,
    ("KID", "1024", "independent", "digits"): NARROW,
    ("recall", "256", "balanced", "digits"): WIDE,
    ("recall", "256", "independent", "noisy digits"): WIDE,
    ("recall", "1024", "balanced", "digits"): WIDE,
    ("recall", "1024", "independent", "digits"): WIDE,
    ("CMMD", "1024", "independent", "digits"): NARROW,
    ("IS", "64", "independent", "digits"): WIDE,
    ("IS", "256", "independent", "digits"): WIDE,
    ("share (leans left)", "64", "balanced", "digits"): BY_CHANCE,
    ("IS", "256", "balanced", "noisy digits"): BY_CHANCE,
    ("FID to float", "256", "independent", "noisy digits"): BY_CHANCE,
    ("difference of numbers", "256", "balanced", "noisy digits"): BY_CHANCE,
    ("difference of FID", "1024", "independent", "digits"): BY_CHANCE,
}


def test_every_kind_of_interval_is_recorded_at_every_n_of_both_designs(simulation):
    found = {(row["metric"], row["n"], row["design"]) for row in recorded()}
    assert found == {
        (name, n, design)
        for name in simulation.INTERVALS
        for n in ("64", "256", "1024")
        for design in ("balanced", "independent")
    }
    assert set(MUST_COVER) < set(simulation.INTERVALS)
