"""What a metric cannot do without, said before a run instead of after it: `ditbench doctor`, `ditbench run --strict`.

Of the run (ASKS): the metric's own error, when it is skipped, says the same. Of this machine (the functions below, for
`metric(needs=…)`): they look whether files and packages are there, and load nothing. What only the samples show (their size,
latents that are not finite) is not known ahead.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

from ditbench.eval.base import Evidence, Metric, Need
from ditbench.eval.weights import Upstream, weights_folder

ASKS = {
    "judge": "the model comes without a judge; take Inception's metrics (metrics=inception)",
    "latents": "no latents were kept with the samples; set generate.keep_latents=true",
    "labels": "the model is not class-conditional, and its samples carry no labels; leave the metric out",
    "reference": "there are no reference images; set metrics.reference to a set (`ditbench data list`), an .npz or a folder",
    "prompts": "the model is not told by prompts; leave the metric out",
    "geneval prompts": "the prompts say nothing of tag and include; set protocol.prompts=geneval or shapes",
    "motion prompts": "the prompts are not those of the shapes world's videos; set protocol.prompts=shapes-video",
}


def offered(evidence: Evidence) -> frozenset[str]:
    """The keys of ASKS that a run has which will be judged by this evidence; its pixels are not looked at."""
    prompts = evidence.generated.prompts
    has = {
        "judge": evidence.judge is not None,
        "latents": evidence.generated.latents is not None,
        "labels": evidence.generated.labels_N is not None,
        "reference": evidence.reference is not None,
        "prompts": bool(prompts),
        "geneval prompts": bool(prompts) and all({"tag", "include"} <= set(prompt.about) for prompt in prompts),
        "motion prompts": bool(prompts) and all("direction" in prompt.about for prompt in prompts),
    }
    return frozenset(name for name, it_has in has.items() if it_has)


def lacking(metric: Metric, offered: Iterable[str] = ASKS) -> list[str]:
    """What the metric lacks, each with what would help; nothing if it can run. offered: by the run (default: everything)."""
    found = [ASKS[name] for name in metric.asks if name not in offered]
    return found + [problem for need in metric.needs if (problem := need())]


def package(module: str, distribution: str) -> Need:
    """An importable module, which is not among ditbench's own requirements."""

    def missing() -> str | None:
        if importlib.util.find_spec(module) is not None:
            return None
        return f"the package {distribution} is missing; `pip install {distribution}`"

    return missing


def weights(what: str, data: str, upstream: Callable[[], Upstream]) -> Need:
    """A library's weights file. data: its name for `ditbench data fetch`."""

    def missing() -> str | None:
        where = upstream()
        if any((folder / where.file_name).is_file() for folder in (weights_folder(), where.library_folder)):
            return None
        return f"{what} are not here; `ditbench data fetch {data}`"

    return missing
