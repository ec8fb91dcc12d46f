"""What two judges take from the CLIP ViT-H/14 that they were trained from: its tokenizer and its configuration (PickScore, HPSv2.1).

Neither publishes a tokenizer beside its weights. Of LAION's folder a few small files are read, and no weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ditbench.eval.base import MetricSkipped
from ditbench.eval.video_judges import judge_folder
from ditbench.harness.common.files import NOT_WHOLE

NAME = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # any of them: a fast tokenizer's, or the words of a slow one


def files_here() -> str | None:
    """For `metric(needs=…)`: None, or what is missing and the command that fetches it."""
    try:
        home = judge_folder(NAME)
    except MetricSkipped:
        home = None
    whole = home and (home / "config.json").is_file() and any((home / file).is_file() for file in TOKENIZER_FILES)
    return None if whole else "CLIP ViT-H/14's tokenizer is not here; `ditbench data fetch clip-h14`"


def folder() -> Path:
    """Where the configuration and the tokenizer are; MetricSkipped where they are not."""
    if problem := files_here():
        raise MetricSkipped(problem)
    return judge_folder(NAME)


@cache
def load_tokenizer(home: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(home, local_files_only=True)
    except NOT_WHOLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(f"{home}: not a whole tokenizer ({reason}); `ditbench data fetch clip-h14`") from error
