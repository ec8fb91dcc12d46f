from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.calibration.recording import Calibration, without_data
from ditbench.harness.calibration.salient import as_tokens, parts, salience, salient
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC
from ditbench.harness.models.calls import Call
from ditbench.methods import smoothquant


def recording(x_SN: list[list[torch.Tensor]], split: int = 0) -> Calibration:
    """Row n of step s is called with x_SN[s][n]; split: so many rows in a first call of their own."""
    steps = []
    for step, rows in enumerate(x_SN):
        each = torch.stack(rows)
        index = torch.arange(len(rows)) + 100 * step
        cut = [slice(0, split), slice(split, None)] if split else [slice(None)]
        steps.append(tuple(Call({"hidden_states": each[part], "row": index[part]}) for part in cut))
    return Calibration(tuple(steps), "key")


@pytest.fixture
def drawn(normal):
    """5 steps of 4 samples (3 channels, 2 × 3 pixels), each step changing each of them by another amount."""
    start, noise = normal(4, 3, 2, 3), normal(5, 4, 3, 2, 3, seed=1)
    sizes = torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [[start[n] * (1 + n) + sizes[s, n] * noise[s, n] for n in range(4)] for s in range(5)]


def by_hand(x_SN):
    """Eq. 3, 6, 7 and 8 in a loop."""
    change, sensitivity = torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    for s in range(5):
        for n in range(4):
            x, behind = x_SN[s][n], x_SN[s + 1][n] if s < 4 else x_SN[s - 1][n]
            change[s, n] = (x - behind).norm() ** 2 / x.norm() ** 2
            tokens = x.flatten(1).T
            sensitivity[s, n] = torch.linalg.svdvals(tokens.T @ tokens)[0]
    return change, sensitivity


def rows_of(chosen: Calibration) -> list[list[int]]:
    return [[int(row) % 100 for call in calls for row in call["row"]] for calls in chosen.steps]


@pytest.mark.parametrize("split", [0, 1])
def test_both_measures_are_the_papers(split, drawn):
    found, expected = parts(recording(drawn, split), channels=3), by_hand(drawn)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=0)


def test_the_score_is_high_only_where_both_are():
    change, sensitivity = torch.tensor([[0.0, 2.0], [4.0, 3.0]]), torch.tensor([[9.0, 5.0], [1.0, 7.0]])
    torch.testing.assert_close(
        salience(change.double(), sensitivity.double()), torch.tensor([[0.0, 0.25], [0.0, 0.5625]]).double()
    )


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("wanted", [3, 9, 20, 500])
def test_the_most_salient_rows_are_kept_and_one_of_every_step(wanted, split, drawn):
    scores = salience(*by_hand(drawn)).flatten()
    best = set(scores.argsort(descending=True)[:wanted].tolist())
    expected = [[n for n in range(4) if 4 * s + n in best] for s in range(5)]
    expected = [rows or [int(scores[4 * s : 4 * s + 4].argmax())] for s, rows in enumerate(expected)]
    assert rows_of(salient(recording(drawn, split), wanted, channels=3)) == expected


def test_the_choice_is_in_the_key_and_looks_at_nothing_random(drawn):
    whole, state = recording(drawn), torch.get_rng_state()
    one, same, fewer = (salient(whole, wanted, 3) for wanted in (9, 9, 5))
    assert one.key == same.key != fewer.key and one.whole == whole.key
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_are_found_wherever_they_lie():
    assert as_tokens(torch.zeros(3, 5, 7), 3).shape == (35, 3)
    assert as_tokens(torch.zeros(5, 3, 2, 7), 3).shape == (70, 3)
    assert as_tokens(torch.zeros(16, 64)).shape == (16, 64)
    assert as_tokens(torch.zeros(4, 8, 8)).shape == (64, 4)


def test_a_method_is_fitted_on_what_is_left(small_target, small_calibration):
    """Statistics of every step are there, though most rows are not."""
    chosen = salient(small_calibration, 2)
    counts = [chosen.num_rows(step) for step in range(chosen.num_steps)]
    assert min(counts) >= 1 and sum(counts) < small_calibration.num_steps * small_calibration.num_rows(0)
    one, other = (
        smoothquant.fit(small_target, each, DYNAMIC, smoothquant.Params()) for each in (chosen, small_calibration)
    )
    assert one.keys() == other.keys() and any(not torch.equal(one[name], other[name]) for name in one)


def test_a_recording_it_cannot_judge_is_refused(drawn):
    uneven = recording(drawn)
    uneven = replace(uneven, steps=((uneven.steps[0][0].pick(slice(0, 2)),), *uneven.steps[1:]))
    with pytest.raises(UserError, match="calibration.select=salient compares a sample's steps"):
        salient(uneven, 3)
    nameless = Calibration(tuple((Call({"noise": torch.randn(2, 3)}),) for _ in range(2)), "key")
    with pytest.raises(UserError, match="this transformer is called with noise"):
        salient(nameless, 3)


def test_without_data_there_is_nothing_to_choose(drawn):
    with pytest.raises(UserError, match="calibration.n=0"):
        salient(without_data(recording(drawn), "method rtn"), 3)
