"""Which modules of a transformer compute softmax(q kᵀ) v, so that their operands can be quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


def attention_modules(
    transformer: nn.Module, *, blocks: Iterable[str] | None, told: Iterable[str], linear: str, skip: Iterable[str]
) -> list[str]:
    """Names, in the order of the modules: what diffusers gives a processor, and what the family says.

    blocks: names of those that count; None: wherever they are. told: the family's own. linear: a regular expression of those that are no
    softmax (linear attention). skip: regular expressions of names to leave in float.
    """
    without = [re.compile(pattern) for pattern in (*skip, *([linear] if linear else []))]
    places = None if blocks is None else [f"{block}." for block in blocks]
    told = set(told)
    return [
        name
        for name, module in transformer.named_modules()
        if (name in told or (hasattr(module, "processor") and hasattr(module, "set_processor")))
        and (places is None or any(name.startswith(place) for place in places))
        and not any(pattern.search(name) for pattern in without)
    ]
