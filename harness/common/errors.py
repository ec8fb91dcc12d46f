"""The one exception that means "the user can mend this", printed as one or two lines; and one line of any other."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

EXIT_USER = 2
EXIT_FAILED_RUNS = 3
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
MOST_NAMED = 24
LISTED = ("method", "model", "metric", "backend", "protocol")  # kinds of names that `ditbench list …` prints
MOST_OF_A_LINE = 1600  # characters


class UserError(Exception):
    """Says where, what was expected, what came and what to do. The command line exits with code 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """no method 'lrqdit'; did you mean 'lrq_dit'? known: clq, htg, ..."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    listed = ", ".join(known)
    if len(known) > MOST_NAMED:
        all_of_them = f"; `ditbench list {kind}s` has all" if kind in LISTED else ""
        listed = f"{', '.join(known[:MOST_NAMED])}, … ({len(known)} in all{all_of_them})"
    return UserError(f"no {kind} {name!r}{guess} known: {listed}")


def shortened(text: str, most: int = 600) -> str:
    """The text, or its two ends and how much is left out between them."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … ({len(text) - most:,} characters more) … {text[-half:]}"


def lines_of(error: BaseException) -> str:
    """An error as it is printed: no line is longer than a screen or two, whatever a user wrote into it."""
    return "\n".join(shortened(line, MOST_OF_A_LINE) for line in str(error).splitlines())


def reason(error: BaseException, own: str | None = None) -> str:
    """One line: what a user can act on, or the kind of error, where it was raised and from where in the file `own`."""
    if isinstance(error, UserError):
        return str(error).replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    callers = [frame for frame in frames[:-1] if frame.filename == own]
    where = ", called from ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (frames[-1], *callers[-1:]))
    first_line = str(error).strip().split("\n")[0]
    kind = f"{'out of memory: ' if out_of_memory(error) else ''}{type(error).__name__}"
    return f"{kind} in {where}{f': {first_line}' if first_line else ''}"


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch or the system found no room, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; nothing here imports it
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def of_the_system(error: OSError) -> UserError:
    """What a disk or a file says for which nobody had better words."""
    explained = UserError(f"{error.filename or 'a file'}: {error.strerror or error}; --debug shows where")
    explained.__cause__ = error
    return explained


def first_words(error: BaseException) -> str:
    """What a library says is wrong, in at most 300 characters: its first line, and the second where the first only announces it.

    The name of the error stands before words that mean nothing without it (a key, an index).
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    words = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words)[:300]
