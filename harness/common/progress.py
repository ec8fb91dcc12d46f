"""Progress of every long part: told to whoever watches the run, and a bar, gone when it ends, where nobody shows it and stderr
is a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from ditbench.harness.common import watch

T = TypeVar("T")


class progress(Generic[T]):  # in small letters: it is called as tqdm is
    """`for each in progress(things, desc="blocks")`, or `with progress(total=n, desc=…, unit=…) as bar: bar.update(k)`."""

    def __init__(
        self, things: Iterable[T] = (), *, total: float | None = None, desc: str = "", unit: str = "it"
    ) -> None:
        if total is None and hasattr(things, "__len__"):
            total = len(things)
        self.things, self.total, self.desc, self.unit = things, total, desc, unit
        self.done: float = 0
        self._bar = tqdm(
            total=total, desc=desc, unit=unit, leave=False, disable=True if watch.progress_is_shown() else None
        )

    def update(self, by: float = 1) -> None:
        self.done += by
        self._bar.update(by)
        watch.advance(self.desc, self.done, self.total, self.unit)

    def at(self, done: float) -> None:
        """So much is done by now, whoever did it."""
        self.update(done - self.done)

    def __iter__(self) -> Iterator[T]:
        with self:
            for each in self.things:
                yield each
                self.update()

    def __enter__(self) -> progress[T]:
        watch.advance(self.desc, self.done, self.total, self.unit)
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        watch.ended(self.desc)
