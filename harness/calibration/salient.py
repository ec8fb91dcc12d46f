"""Which rows of a recording a method is fitted on: the most salient ones (S²Q-VDiT, Feng et al. 2025, arXiv:2508.04016, Eq. 3 to 8).

    C_diff  = ‖x_t − x_{t−1}‖² / ‖x_t‖²         how much a step changes its sample
    C_quant = ‖x_tᵀ x_t‖₂                        how large an error of the weights may become
    C       = norm(C_diff) · norm(C_quant),      norm: from 0 (least) to 1 (most) over all candidates

x_t (tokens × channels) is a row's noisy sample as the transformer is given it at a step, x_{t−1} the same at the next step, that is with less noise; at
the last one, which has none behind it, the one before stands in. ‖·‖₂ of a matrix is its largest singular value.

Departs from the paper: where none of a step's rows is among the most salient, its best one is taken as well, since
methods ask what layers read at every step. Rows with and without the condition are candidates both, and equals: their x is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditbench.harness.calibration.recording import Calibration, selected
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.calls import Call

ALL, SALIENT = "all", "salient"
CHOICES = (ALL, SALIENT)
SAMPLE = ("hidden_states", "x", "sample", "latents")  # what the noisy sample is called, by the first that a call has


def salient(calibration: Calibration, wanted: int, channels: int | None = None) -> Calibration:
    """The `wanted` most salient rows of all steps, and the best of each step that has none among them.

    channels: of a noisy sample, which says along which dimension they lie; None: along the first, or of two the last.

    Raises:
        UserError: the recording's steps have different numbers of rows, or no argument that is known as the noisy sample.
    """
    rows = {calibration.num_rows(step) for step in range(calibration.num_steps)}
    if len(rows) != 1:
        raise UserError(
            f"calibration.select={SALIENT} compares a sample's steps, and this model is called differently often at each; "
            f"set calibration.select={ALL}"
        )
    scores_SN = salience(*parts(calibration, channels))
    kept_SN = torch.zeros_like(scores_SN, dtype=torch.bool)
    kept_SN.view(-1)[scores_SN.flatten().argsort(descending=True, stable=True)[:wanted]] = True
    for step in (~kept_SN.any(1)).nonzero().flatten().tolist():
        kept_SN[step, scores_SN[step].argmax()] = True
    return selected(calibration, [kept.nonzero().flatten() for kept in kept_SN], f"{SALIENT} {wanted}")


def salience(change_SN: Tensor, sensitivity_SN: Tensor) -> Tensor:
    """The product of both, each from 0 to 1 over all candidates."""
    return _normalized(change_SN) * _normalized(sensitivity_SN)


def parts(calibration: Calibration, channels: int | None = None) -> tuple[Tensor, Tensor]:
    """(C_diff, C_quant) of every row, float64 (S, N)."""
    steps = calibration.num_steps
    change_SN = torch.zeros(steps, calibration.num_rows(0), dtype=torch.float64)
    sensitivity_SN = torch.zeros_like(change_SN)
    places_SN = [_places(calls) for calls in calibration.steps]
    for row in range(calibration.num_rows(0)):
        x_S = [_sample(*of_step[row]) for of_step in places_SN]
        for step, x in enumerate(x_S):
            other = x_S[step + 1] if step + 1 < steps else x_S[max(step - 1, 0)]
            change_SN[step, row] = (x - other).square().sum() / x.square().sum()
            sensitivity_SN[step, row] = largest_eigenvalue(as_tokens(x, channels))
    return change_SN, sensitivity_SN


def sample_path(call: Call) -> str:
    found = next((name for name in SAMPLE if name in call.rows), None)
    if found is None:
        raise UserError(
            f"calibration.select={SALIENT} knows the noisy sample by its name ({', '.join(SAMPLE)}), and this transformer is called with "
            f"{', '.join(call.rows)}; set calibration.select={ALL}"
        )
    return found


def as_tokens(x: Tensor, channels: int | None = None) -> Tensor:
    """One row's sample as (tokens, channels)."""
    if x.ndim < 2:
        return x.reshape(1, -1)
    dims = [dim for dim in range(x.ndim) if x.shape[dim] == channels]
    dim = dims[0] if dims else x.ndim - 1 if x.ndim == 2 else 0
    return x.movedim(dim, -1).flatten(0, -2)


def largest_eigenvalue(x_TC: Tensor) -> Tensor:
    """‖xᵀ x‖₂, from the smaller of the two Gram matrices."""
    gram = x_TC.T @ x_TC if x_TC.shape[0] >= x_TC.shape[1] else x_TC @ x_TC.T
    return torch.linalg.eigvalsh(gram)[-1]


def _normalized(values_SN: Tensor) -> Tensor:
    spread = values_SN.max() - values_SN.min()
    return (values_SN - values_SN.min()) / spread if float(spread) > 0 else torch.ones_like(values_SN)


def _places(calls: Sequence[Call]) -> list[tuple[Call, int]]:
    """Where each row of a step lies: its call, and its place there."""
    return [(call, place) for call in calls for place in range(call.num_rows)]


def _sample(call: Call, place: int) -> Tensor:
    (x,) = Call({"x": call.rows[sample_path(call)]}).pick(slice(place, place + 1))["x"]
    return x.double().cpu()
