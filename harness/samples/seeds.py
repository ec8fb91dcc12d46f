"""One seed per sample: the noise of sample i does not depend on the batch it is drawn in."""

from __future__ import annotations

import hashlib


def sample_seeds(seed: int, n: int, stream: str) -> tuple[int, ...]:
    """n independent 63-bit seeds; `stream` keeps calibration and generation apart."""
    digests = (hashlib.sha256(f"{stream}:{seed}:{index}".encode()).digest() for index in range(n))
    return tuple(int.from_bytes(digest[:8], "little") >> 1 for digest in digests)
