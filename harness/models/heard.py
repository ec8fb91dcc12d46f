"""What the libraries say in their logs while they load: heard here, and by nobody else unless the loading goes well.

Of weights that a checkpoint lacks, or that its configuration does not know, diffusers and transformers only warn.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ditbench.harness.common.errors import UserError

LIBRARIES = ("diffusers", "transformers", "peft")
OF_ANOTHER = "the configuration is another model's, or the weights are"
NOT_WHOLE = "the checkpoint lacks weights: it is not whole, or of another model"
UNUSED = re.compile(r"were not used when initializing (\w+): *\n? *\['?(.*?)'?\]", re.DOTALL)
MISSING = re.compile(r"'([\w.]+)'\]|(\S+)\s*\|\s*MISSING|\['([\w.]+)'")
UNEXPECTED = re.compile(r"^(\S+)\s*\|[^|\n]*UNEXPECTED", re.MULTILINE)
REPORT = re.compile(r"(\w+) LOAD REPORT")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NUMBER = re.compile(r"(?<=\.)(?:\d+|\{[^}]*\})(?=\.)")  # of a layer, or of several in one line of a report
COMPUTED = (
    re.compile(  # what older versions saved with the weights, and no version reads: the caption's null, constants
        r"(?:^|\.)(?:caption_projection\.y_embedding|inv_freq|freqs(?:_cis|_cos|_sin)?|position_ids)$"
    )
)


@contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """Collects warnings. They are passed on at the end, unless an error leaves the block: it says what was wrong."""
    said: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = said.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    for entry in said:
        logger = logging.getLogger(entry.name)
        if logger.isEnabledFor(entry.levelno):
            logger.handle(entry)


def refuse_made_up(said: list[logging.LogRecord], where: str) -> None:
    """Raise UserError where a library drew weights that a checkpoint lacks."""
    for text in _texts(said):
        if "newly initialized" in text:
            first = MISSING.search(text)
            name = next((each for each in first.groups() if each), "some") if first else "some"
            raise UserError(f"{where}: no weights for {name}, which would be random; {NOT_WHOLE}")


def refuse_left_out(said: list[logging.LogRecord], where: str, parts: Iterable[Any]) -> None:
    """Raise UserError where a library left out weights that belong to a model: its configuration is another one's.

    Of diffusers' models all weights count. Text encoders are often cut out of larger models, so of transformers' only
    further layers of a list that the model has. parts: what was loaded.
    """
    import diffusers  # here, since whoever only reads settings of adapters has nothing loaded

    for text in _texts(said):
        for kind, listed in UNUSED.findall(text):
            names = [name for name in listed.replace("'", "").split(", ") if not COMPUTED.search(name)]
            if names and hasattr(diffusers, kind):
                raise _left_out(where, kind, names)
        if report := REPORT.search(text):
            models = [part for part in parts if type(part).__name__ == report[1]]
            known = {NUMBER.sub("*", name) for model in models for name in _weights_of(model)}
            names = [name for name in UNEXPECTED.findall(text) if NUMBER.sub("*", name) in known]
            if names:
                raise _left_out(where, report[1], names)


def _left_out(where: str, kind: str, names: list[str]) -> UserError:
    return UserError(
        f"{where}: its {kind} has weights that its configuration does not know ({sorted(names)[0]}, {len(names)} in all); they "
        f"would be left out: {OF_ANOTHER}"
    )


def _weights_of(model: Any) -> list[str]:
    return list(model.state_dict()) if isinstance(model, nn.Module) else []


def _texts(said: list[logging.LogRecord]) -> list[str]:
    return [COLOUR.sub("", entry.getMessage()) for entry in said]
