"""What a prompt-told model is asked to draw: a set of the shapes world, a set that `ditbench data` knows, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.models.zoo import shapes
from ditbench.harness.samples.samples import Prompt

CALIBRATION_SEED = 1  # drawn anew; of the kinds that have a dozen captions in all, some are those that are scored
MANY = 240


@dataclass(frozen=True)
class Set:
    """needs: the entry of `ditbench data` that it is taken from; None: it is made here."""

    what: str
    make: Callable[[], tuple[Prompt, ...]]
    needs: str | None = None


SETS = {
    "shapes": Set("captions of the shapes world, GenEval's six kinds in turn", lambda: _captions(seed=0)),
    "shapes-calibration": Set("the same, drawn anew for calibration", lambda: _captions(CALIBRATION_SEED)),
    "shapes-video": Set("one moving object of the shapes world, four directions in turn", lambda: _motions(seed=0)),
    "shapes-video-calibration": Set("the same, drawn anew for calibration", lambda: _motions(CALIBRATION_SEED)),
    "vbench-mlperf": Set(
        "the 248 of VBench's prompts that MLPerf's Wan 2.2 is drawn from", lambda: _mlperf(), "vbench"
    ),
}


@cache
def load_prompts(name: str, most: int | None = None) -> tuple[Prompt, ...]:
    """The first `most` prompts of a set or file, in its order; all without it.

    Raises:
        UserError: no such set or file, or a line that cannot be read.
    """
    if name in SETS:
        return SETS[name].make()[:most]
    from ditbench.eval import prompts
    from ditbench.eval.data import PROMPTS, names_of

    others, path = names_of(PROMPTS), Path(name)
    if name not in others and path.name == name and not path.suffix and not path.is_file():
        raise unknown_name("prompt set", name, (*SETS, *others))
    return prompts.load_prompts(name, most)


def _mlperf() -> tuple[Prompt, ...]:
    """Those that VBench made for one of the six dimensions.

    Raises:
        UserError: VBench's file is not here, or is another one.
    """
    from ditbench.eval import prompts
    from ditbench.eval.mlperf_wan import DIMENSIONS, PROMPTS

    found = [each for each in prompts.load_prompts("vbench") if set(each.about.get("dimension", ())) & set(DIMENSIONS)]
    if len(found) != PROMPTS:
        raise UserError(f"vbench-mlperf: expected {PROMPTS} of VBench's prompts, came {len(found)}; fetch vbench again")
    return tuple(found)


def _captions(seed: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(caption.text, caption.about) for caption in shapes.prompts(MANY, seed))


def _motions(seed: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(motion.text, motion.about) for motion in shapes.motions(MANY, seed))
