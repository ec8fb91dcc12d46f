"""Where a network's weights are: a folder of ours, the library's own, or else (Inception's) the library's address.

Files are looked for in `$DITBENCH_WEIGHTS` (default `$DITBENCH_DATA/weights`, that is `~/.cache/ditbench/weights`), then
where the library itself would have put them. `DITBENCH_OFFLINE=1` (or `HF_HUB_OFFLINE=1`) never asks the network.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import threading
import urllib.request
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from ditbench.eval.base import MetricSkipped
from ditbench.harness.common.files import atomic_path, file_sha256

CONNECT_TIMEOUT_S = 5.0
_NETWORK_ERRORS = (OSError, HTTPException)  # URLError and HTTPError are OSErrors


@dataclass(frozen=True)
class Upstream:
    """url as the library defines it; library_folder is where the library itself keeps the file."""

    url: str
    library_folder: Path

    @property
    def file_name(self) -> str:
        return Path(urlsplit(self.url).path).name

    @property
    def sha256_prefix(self) -> str | None:
        """torch.hub's convention: name-<first 8 or more digits of the SHA-256>.pth."""
        match = re.search(r"-([0-9a-f]{8,})\.", self.file_name)
        return match.group(1) if match else None


def data_folder() -> Path:
    """Where `ditbench data fetch` puts what others publish."""
    return Path(os.environ.get("DITBENCH_DATA") or "~/.cache/ditbench").expanduser()


def weights_folder() -> Path:
    return Path(os.environ.get("DITBENCH_WEIGHTS") or data_folder() / "weights").expanduser()


def offline() -> bool:
    return os.environ.get("DITBENCH_OFFLINE") == "1" or os.environ.get("HF_HUB_OFFLINE") == "1"


def local_weights(upstream: Upstream) -> tuple[Path, str] | None:
    """The file and its SHA-256 if it is on this machine; MetricSkipped where it is not the file its name says."""
    for folder in (weights_folder(), upstream.library_folder):
        path = folder / upstream.file_name
        if path.is_file():
            return path, _checked_sha256(path, upstream)
    return None


def find_weights(upstream: Upstream) -> tuple[Path, str]:
    """The file and its SHA-256; downloads it if it is nowhere. MetricSkipped where it cannot be had."""
    if (found := local_weights(upstream)) is not None:
        return found
    path = weights_folder() / upstream.file_name
    help_text = f"put {upstream.file_name} from {upstream.url} into {weights_folder()}"
    if offline():
        raise MetricSkipped(f"Inception's weights are not here, and downloads are switched off; {help_text}")
    if problem := _download(upstream.url, path):
        raise MetricSkipped(f"Inception's weights are not here and could not be downloaded ({problem}); {help_text}")
    return path, _checked_sha256(path, upstream)


def stored_sha256(path: Path) -> str:
    """SHA-256 of a file, computed again only when the file has changed."""
    stat = path.stat()
    return _file_sha256(path, stat.st_mtime_ns, stat.st_size)


def _checked_sha256(path: Path, upstream: Upstream) -> str:
    sha256 = stored_sha256(path)
    if upstream.sha256_prefix and not sha256.startswith(upstream.sha256_prefix):
        raise MetricSkipped(
            f"{path}: expected a SHA-256 beginning {upstream.sha256_prefix}, came {sha256[:8]}; "
            f"delete it and fetch {upstream.url} again"
        )
    return sha256


@cache
def _file_sha256(path: Path, mtime_ns: int, size: int) -> str:
    return file_sha256(path)


@cache
def _download(url: str, path: Path) -> str | None:
    """None, or what went wrong. Asked once per process, so that ten metrics do not wait ten times."""
    answers: queue.Queue = queue.Queue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S))
        except _NETWORK_ERRORS as error:
            answers.put(error)

    # A thread because the time-out of urlopen does not cover looking the name up.
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_TIMEOUT_S + 1)
        if isinstance(answer, _NETWORK_ERRORS):
            return str(answer)
        with answer, atomic_path(path) as part, part.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except queue.Empty:
        return f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
    except _NETWORK_ERRORS as error:
        return str(error)
    return None
