"""`protocol.noise`: own, shared, a file of latents, or one that `ditbench data` knows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ditbench.harness.samples.noise import EACH_ITS_OWN, ONE_FOR_ALL, OWN, SHARED, Noise, read_noise


@cache
def load_noise(name: str) -> Noise:
    """The noise by its name in a protocol.

    Raises:
        UserError: no such file, one that was not fetched, or no latents in it.
    """
    if name in (OWN, SHARED):
        return EACH_ITS_OWN if name == OWN else ONE_FOR_ALL
    from ditbench.eval.data import NOISE, names_of, need_file

    return read_noise(need_file(name) if name in names_of(NOISE) else Path(name))
