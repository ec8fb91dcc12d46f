"""A pipeline that begins with given latents instead of drawing them, checked against what it would have drawn."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.parts import replaced
from ditbench.harness.samples.noise import Noise


@contextmanager
def beginning_with(running: Any, noise: Noise) -> Iterator[None]:
    """Inside, `prepare_latents` of the pipeline is told the latents, as if the pipeline had been called with them.

    Raises:
        UserError: it takes none, or latents of another shape than those given.
    """
    if noise.latents is None:
        yield
        return
    prepare = getattr(running, "prepare_latents", None)
    if prepare is None or "latents" not in inspect.signature(prepare).parameters:
        raise UserError(f"a {type(running).__name__} takes no latents to begin with; set protocol.noise=own or shared")
    with replaced(running, "prepare_latents", functools.partial(_told, noise.latents)):
        yield


def _told(latents_1: Tensor, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    drawn = prepare(*args, **kwargs)
    its_own = drawn[0] if isinstance(drawn, tuple) else drawn
    if its_own.shape[1:] != latents_1.shape[1:]:
        raise UserError(
            f"protocol.noise: the latents of one sample are {tuple(its_own.shape[1:])} in this model and at this size, and the file has "
            f"{tuple(latents_1.shape[1:])}"
        )
    given = inspect.signature(prepare).bind(*args, **kwargs)
    given.arguments["latents"] = latents_1.expand(its_own.shape).contiguous()
    return prepare(*given.args, **given.kwargs)
