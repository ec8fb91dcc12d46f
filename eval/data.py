"""What others publish and a benchmark needs: prompt sets, reference batches, judges' weights (eval/data.yaml).

Files go below `$DITBENCH_DATA` (default `~/.cache/ditbench`): prompts/, reference/, noise/, and weights/ where metrics look for
them. Models of the Hugging Face hub stay in its own cache. Nothing is fetched unless it is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ditbench.eval.weights import data_folder, stored_sha256, weights_folder
from ditbench.harness.common.errors import UserError, unknown_name

REGISTRY = Path(__file__).with_name("data.yaml")
PROMPTS, REFERENCE, WEIGHTS, NOISE = KINDS = ("prompts", "reference", "weights", "noise")


@dataclass(frozen=True)
class Data:
    """One entry of data.yaml: a file at `url`, or a model `repo` on the hub whose weight file is any of `files`.

    only: the files of a repo that are fetched; all, where there are none.
    """

    name: str
    kind: str
    what: str
    licence: str
    url: str | None = None
    repo: str | None = None
    files: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    file: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.url is None) == (self.repo is None) or bool(self.repo) != bool(self.files):
            raise ValueError(f"{REGISTRY}: {self.name} needs a kind of {KINDS} and either url, or repo and files")

    @property
    def address(self) -> str:
        return self.url or f"https://huggingface.co/{self.repo}"

    @property
    def path(self) -> Path | None:
        """Where the file is or belongs; of a hub model: its weight file if the cache has it."""
        if self.url is None:
            return _in_hub_cache(self)
        folder = weights_folder() if self.kind == WEIGHTS else data_folder() / self.kind
        return folder / (self.file or Path(urlsplit(self.url).path).name)

    @property
    def is_here(self) -> bool:
        return self.path is not None and self.path.is_file()

    @property
    def by_hand(self) -> str:
        """The command that fetches it without ditbench."""
        if self.repo:
            return " ".join(("hf download", self.repo, *self.only))
        return f"curl -L --create-dirs -o {self.path} {self.url}"


@dataclass(frozen=True)
class Verdict:
    """ok: True as published, or here and nothing published to hold it against; False not as published; None not here."""

    name: str
    ok: bool | None
    says: str


@cache
def known_data() -> Mapping[str, Data]:
    entries: dict[str, dict[str, Any]] = yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))
    lists = ("files", "only")
    return {
        name: Data(name, **fields | {each: tuple(fields.get(each, ())) for each in lists})
        for name, fields in entries.items()
    }


def find_data(name: str) -> Data:
    if name not in known_data():
        raise unknown_name("data", name, known_data())
    return known_data()[name]


def names_of(kind: str) -> list[str]:
    return [name for name, data in known_data().items() if data.kind == kind]


def need_file(name: str) -> Path:
    """The file of an entry that has been fetched; UserError with the command where it has not."""
    data = find_data(name)
    if data.path is None or not data.path.is_file():
        raise UserError(f"{name} is not here; `ditbench data fetch {name}` fetches it from {data.address}")
    return data.path


def listed() -> str:
    from ditbench.harness.common.text_table import table

    rows = [
        (d.name, d.kind, "here" if d.is_here else "–", _size(d.size_bytes), d.licence, d.what)
        for d in known_data().values()
    ]
    text = table(("name", "kind", "here", "size", "licence", "what"), rows)
    return f"{text}\n\nfiles: {data_folder()} (DITBENCH_DATA=…); models of the hub: its own cache"


def verify(data: Data) -> Verdict:
    """Is it here, of the published size, with the published hash?"""
    if not data.is_here:
        return Verdict(data.name, None, f"not here; `ditbench data fetch {data.name}`")
    path = data.path
    assert path is not None
    size_bytes = path.stat().st_size
    again = f"; delete {path} and fetch it again"
    if data.size_bytes is not None and size_bytes != data.size_bytes:
        return Verdict(data.name, False, f"expected {data.size_bytes} bytes, came {size_bytes}{again}")
    sha256 = stored_sha256(path)
    published = data.sha256 or data.sha256_prefix
    if published is None:
        return Verdict(data.name, True, f"{size_bytes} bytes; no published hash; yours is {sha256}")
    if not sha256.startswith(published):
        return Verdict(data.name, False, f"expected a SHA-256 beginning {published}, came {sha256}{again}")
    how = "is" if data.sha256 else "begins"
    return Verdict(data.name, True, f"{size_bytes} bytes; SHA-256 {how} as published: {published}")


def verified(names: Iterable[str]) -> tuple[str, bool]:
    """A line per entry, and whether none is other than published."""
    from ditbench.harness.common.text_table import table

    verdicts = [verify(find_data(name)) for name in names]
    marks = {True: "ok", False: "BAD", None: "–"}
    return table(("", "name", "what was found"), [(marks[v.ok], v.name, v.says) for v in verdicts]), all(
        v.ok is not False for v in verdicts
    )


def _in_hub_cache(data: Data) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(str(data.repo), file) for file in data.files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _size(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"
