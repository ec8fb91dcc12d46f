"""The noise that samples begin with: each its own, all the same of one seed, or all the same as a file has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import file_sha256

OWN, SHARED, GIVEN = "own", "shared", "given"
ENDINGS = (".pt", ".npy")


@dataclass(frozen=True, eq=False)
class Noise:
    """latents: of GIVEN, (1, …) float32, what every sample begins with; sha256 is that of its file."""

    kind: str = OWN
    latents: Tensor | None = None
    sha256: str | None = None


EACH_ITS_OWN, ONE_FOR_ALL = Noise(OWN), Noise(SHARED)


def read_noise(path: Path) -> Noise:
    """The latents of one sample in a file of torch or NumPy.

    Raises:
        UserError: no such file, or something else than one tensor of finite numbers (1, …) in it.
    """
    try:
        if path.suffix not in ENDINGS or not path.is_file():
            raise UserError(
                f"protocol.noise={path}: expected own, shared, or a file ({' or '.join(ENDINGS)}) of latents (1, …)"
            )
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a file that is none makes of it
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"protocol.noise={path}: expected a tensor of latents, came {reason}") from error
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 3 or len(found) != 1:
        came = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"protocol.noise={path}: expected a tensor of floats (1, …), came {came}")
    if not bool(found.isfinite().all()):
        raise UserError(f"protocol.noise={path}: expected finite numbers, came NaN or infinity")
    return Noise(GIVEN, found.float().contiguous(), file_sha256(path))
