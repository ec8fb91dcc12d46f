"""What a model is told to draw, and with which noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditbench.harness.samples.noise import EACH_ITS_OWN, Noise
from ditbench.harness.samples.samples import Prompt

LABELS, PROMPTS = "labels", "prompts"  # what a family is told to draw


@dataclass(frozen=True)
class Conditions:
    """What is to be drawn, one row per sample: class labels or prompts. seeds: noise does not depend on the batch size.

    noise: given latents, which all begin with instead of what their seeds would draw; nothing else of it counts here.
    """

    seeds: tuple[int, ...]
    labels_N: Tensor | None = None
    prompts: tuple[Prompt, ...] = ()
    noise: Noise = EACH_ITS_OWN

    def __len__(self) -> int:
        return len(self.seeds)

    def rows(self, start: int, stop: int) -> Conditions:
        labels_N = None if self.labels_N is None else self.labels_N[start:stop]
        return Conditions(self.seeds[start:stop], labels_N, self.prompts[start:stop], self.noise)
