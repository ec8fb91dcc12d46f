"""What a page loads only when it shows it: pictures, and data of single runs. In the page itself; where that would be much, beside it.

A page opened from a disk may not read files (`fetch` is refused there), but it may show a picture and run a script: so data lie
in scripts, each of which hands one value to the page.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError

INLINE_MAX_BYTES = 4_000_000  # with plotly.js and the table a page then stays below 10 MB
MARK = ".ditbench-page"  # in a folder that may be replaced, since a page made it


class PageFiles:
    """Files by name ("samples/3.webp"), in memory until there are more than INLINE_MAX_BYTES of them, then on disk.

    Names are ours: they hold no part of a record's text.
    """

    def __init__(self, page: Path) -> None:
        self.folder = page.with_name(f"{page.stem}_files")
        self._part = page.with_name(f".{self.folder.name}.{os.urandom(4).hex()}.part")
        self._held: dict[str, bytes] = {}
        self._written: set[str] = set()
        self._bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._written

    @property
    def beside(self) -> bool:
        return bool(self._written)

    def picture(self, name: str, content: bytes) -> str:
        """The name, under which the page finds the picture."""
        self._add(name, content)
        return name

    def data(self, name: str, value: Any) -> str:
        """A value that JSON holds; the page asks for it by the name."""
        self._add(f"{name}.js", compact(value).encode())
        return name

    def publish(self) -> dict[str, Any]:
        """What the page has to know: {"beside": folder or null, "inline": {name: data URI or value}}. The folder takes its name.

        Raises:
            UserError: there is a folder of that name that no page made.
        """
        if self.folder.exists() and not (self.folder / MARK).exists():
            raise UserError(f"{self.folder}: a folder that no page made; move it away, or give another --out")
        if self.beside:
            (self._part / MARK).touch()
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._part, self.folder)
            return {"beside": self.folder.name, "inline": {}}
        shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier page of this name
        return {
            "beside": None,
            "inline": {name.removesuffix(".js"): _inlined(name, c) for name, c in self._held.items()},
        }

    def discard(self) -> None:
        """Nothing is left of what was written and not published."""
        shutil.rmtree(self._part, ignore_errors=True)

    def _add(self, name: str, content: bytes) -> None:
        if name in self:
            return
        self._bytes += len(content) * (1 if name.endswith(".js") else 4 / 3)
        self._held[name] = content
        if self._bytes > INLINE_MAX_BYTES:
            for held, its in self._held.items():
                self._write(held, its)
            self._held.clear()

    def _write(self, name: str, content: bytes) -> None:
        path = self._part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".js"):
            content = b"ditbench.loaded(" + json.dumps(name.removesuffix(".js")).encode() + b"," + content + b");\n"
        path.write_bytes(content)
        self._written.add(name)


def compact(value: Any) -> str:
    """JSON without blanks; a number that is not finite is a mistake of whoever made the value."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _inlined(name: str, content: bytes) -> Any:
    if name.endswith(".js"):
        return json.loads(content)
    return f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}"
