"""What to ship: who is on the front, which run is its knee, and what the sentence about it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, fronts


def dominated(i, cost, quality):
    """By the definition, pair by pair."""
    return any(
        cost[j] <= cost[i] and quality[j] >= quality[i] and (cost[j] < cost[i] or quality[j] > quality[i])
        for j in range(len(cost))
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_who_is_not_dominated_by_anybody(seed):
    random = np.random.default_rng(seed)
    cost, quality = random.integers(0, 6, 12).tolist(), random.integers(0, 6, 12).tolist()  # with ties
    found = fronts.on_front(cost, quality)
    best = [i for i in range(12) if not dominated(i, cost, quality)]
    pairs = [(cost[i], quality[i]) for i in found]
    assert set(pairs) == {(cost[i], quality[i]) for i in best} and len(set(pairs)) == len(pairs), "of equals one"
    assert all(cost[a] <= cost[b] for a, b in itertools.pairwise(found))


def test_the_knee_is_where_more_bytes_stop_buying_quality():
    assert fronts.knee_of([1, 2, 3, 4], [0, 8, 9, 10]) == 1
    assert fronts.knee_of([1, 2, 3, 4], [0, 3, 9.9, 10]) == 2
    assert fronts.knee_of([1, 2, 3], [0, 5, 10]) is None, "a straight line has none"
    assert fronts.knee_of([1, 2, 3], [0, 1, 10]) is None, "and neither has one that sags"
    assert fronts.knee_of([1, 2], [0, 10]) is None


@pytest.fixture
def group(add_run, results_dir, metric):
    """Two of 4 bits, one of 6, one of 8; `gone` would be the best and smallest but failed; `black` collapsed."""
    sizes = {"fp": 1000, "rtn": 250, "quarot": 260, "six": 380, "eight": 520, "black": 200}
    values = {"rtn": 20.0, "quarot": 27.0, "six": 28.0, "eight": 29.5, "black": 60.0}
    for name, size in sizes.items():
        metrics = {"psnr": metric(values[name], 0.5, unit="dB")} if name in values else {}
        if name == "black":
            alarm = {"alarms": {"blank": {"share": 0.9, "n": 64}}, "alarmed": ["blank"]}
            metrics["collapse"] = metric(0.9, better="lower") | {"passport": alarm}
        bits = {"fp": "W16A16", "six": "W6A6", "eight": "W8A8"}.get(name, "W4A4")
        times = {"rtn": 1.5, "quarot": 1.4, "eight": 0.8}.get(name)
        efficiency = {"model_bytes": size * 2**10, "compression": 1000 / size, "speedup": times}
        add_run(name, bits, metrics=metrics, measured=times is not None, efficiency=efficiency)
    add_run("gone", "W4A4", error="ValueError: no")
    (found,) = compare.groups(read_all(results_dir))
    return found


def test_by_size_the_knee_is_named_with_its_interval_and_what_the_next_ones_give(group):
    by_size, by_speed = fronts.fronts(group, "psnr")
    named = [group.run_names[place] for place in by_size.front]
    assert named == ["rtn", "quarot", "six", "eight"] and group.run_names[by_size.knee] == "quarot"
    first, larger, smaller = by_size.sentences
    assert "the knee is quarot W4A4 (0.25 MiB, 3.8 × smaller than bf16; psnr 27.00 [26.50, 27.50] dB" in first
    assert larger.startswith(
        "The next larger, six W6A6, has 1.46 × the bytes and psnr +1.00 dB (95 % interval of this pair alone [+"
    )
    assert smaller.startswith(
        "The next smaller, rtn W4A4, has 0.96 × the bytes and psnr −7.00 dB (95 % interval of this pair alone [−"
    )
    assert by_speed.device == "cpu (2 cores)"


def test_speed_is_what_was_measured_and_slower_than_bf16_is_called_so(group):
    _, by_speed = fronts.fronts(group, "psnr")
    assert [group.run_names[place] for place in by_speed.front] == ["rtn", "quarot", "eight"]
    assert group.run_names[by_speed.knee] == "quarot" and "1.40 × as fast as eager bf16" in by_speed.sentences[0]
    eight = next(place for place, name in enumerate(group.run_names) if name == "eight")
    assert "0.80 × as fast as eager bf16, slower than bf16" in fronts._described(group, "psnr", fronts.SPEED, eight)


def test_runs_that_failed_or_collapsed_are_left_out_and_named(group):
    by_size, _ = fronts.fronts(group, "psnr")
    assert by_size.left_out == ["black W4A4: samples collapsed: blank 90% of them", "gone W4A4: failed"]
    assert "black" not in [group.run_names[place] for place in by_size.places]


def test_a_run_that_stores_more_than_its_label_says_is_flagged(group):
    group.records[group.run_names.index("quarot")].bits["weight_bits_quantized_layers"] = 5.5
    by_size, _ = fronts.fronts(group, "psnr")
    assert "▲ 5.50 bits a weight, more than its label says" in by_size.sentences[0]


def test_where_lower_is_better_the_front_turns_round(add_run, results_dir, fid):
    for name, size, score in (("a", 200, 9.0), ("b", 300, 5.0), ("worse", 310, 8.0)):
        add_run(name, metrics={"fid": fid(score)}, efficiency={"model_bytes": size * 2**10})
    (group,) = compare.groups(read_all(results_dir))
    (by_size,) = fronts.fronts(group, "fid")
    assert [group.run_names[place] for place in by_size.front] == ["a", "b"]
    assert "no run stands out" in by_size.sentences[0]


def test_runs_whose_samples_do_not_pair_get_no_interval(add_run, results_dir, metric):
    for name, size, psnr in (("a", 200, 20.0), ("b", 210, 27.0), ("c", 400, 28.0)):
        metrics = {"psnr": metric(psnr, 0.5, unit="dB")}
        add_run(name, metrics=metrics, efficiency={"model_bytes": size * 2**10}, tested=name != "b")
    (group,) = compare.groups(read_all(results_dir))
    (by_size,) = fronts.fronts(group, "psnr")
    assert group.run_names[by_size.knee] == "b"
    assert all("no interval: their samples do not pair" in line for line in by_size.sentences[1:])


def test_one_run_alone_is_both_and_a_metric_that_ranks_nobody_has_no_front(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0), "brightness": metric(0.4, better="none")})
    (group,) = compare.groups(read_all(results_dir))
    (by_size,) = fronts.fronts(group, "psnr")
    assert by_size.knee is None and "both smallest and best: a W4A8" in by_size.sentences[0]
    assert fronts.fronts(group, "brightness") == []


def test_who_is_not_told_apart_from_the_best_is_named(add_run, results_dir, metric):
    for name, score, size in (("a", 30.0, 300), ("twin", 30.0, 310), ("far", 20.0, 320)):
        add_run(
            name, "W4A4", metrics={"psnr": metric(score)}, efficiency={"model_bytes": size * 2**10, "compression": 3.0}
        )
    (group,) = compare.groups(read_all(results_dir))
    (by_size,) = fronts.fronts(group, "psnr")
    assert by_size.sentences[0].startswith("By size, one run is both smallest and best: a W4A4")
    assert by_size.sentences[1] == "In psnr a W4A4 is not told apart from twin at these bits."
