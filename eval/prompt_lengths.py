"""How many prompts are longer than what a judge reads: it cuts them, and scores the picture by what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cut_off(tokenizer: Any, max_tokens: int, texts: Sequence[str]) -> dict[str, int]:
    """The passport's two fields: tokens the judge reads, those that begin and end a text included, and texts that have more."""
    tokens = tokenizer(list(texts), verbose=False)["input_ids"]
    return {"max_tokens": max_tokens, "prompts_cut_off": sum(len(ids) > max_tokens for ids in tokens)}
