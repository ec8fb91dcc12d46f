"""Where a network's weights are: a folder of ours, or the library's own. No metric downloads any; `ditbench data fetch` does.

Files are looked for in `$DITBENCH_WEIGHTS` (default `$DITBENCH_DATA/weights`, that is `~/.cache/ditbench/weights`), then
where the library itself would have put them. `DITBENCH_OFFLINE=1` (or `HF_HUB_OFFLINE=1`) never asks the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from ditbench.eval.base import MetricSkipped
from ditbench.harness.common.files import file_sha256

CLEAN_FID_FOLDER = Path("/tmp")  # where clean-fid itself downloads to


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


def find_weights(upstream: Upstream, missing: Callable[[], str | None] = lambda: None) -> tuple[Path, str]:
    """The file and its SHA-256; MetricSkipped where it is not here. missing: says how to get it, as `ditbench doctor` does."""
    if (found := local_weights(upstream)) is not None:
        return found
    help_text = f"put {upstream.file_name} from {upstream.url} into {weights_folder()}"
    raise MetricSkipped(f"{missing() or 'weights are not here'}, or {help_text}")


def others_here() -> dict[str, list[int]]:
    """Every file that a metric's network of others may be read from, as it is now: {path: [bytes, time of change in ns]}.

    Of whatever lies in the folders that are looked in: more than one metric reads, never less, and nothing is hashed or loaded.
    """
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [weights_folder(), Path(torch.hub.get_dir()) / "checkpoints"]
    folders += [Path(os.environ["DITBENCH_JUDGES"])] if os.environ.get("DITBENCH_JUDGES") else []
    files = [path for folder in folders for path in folder.rglob("*")]
    files += [*CLEAN_FID_FOLDER.glob("inception-*.pt"), *Path(HF_HUB_CACHE).glob("models--*/snapshots/*/*")]
    states = {str(path): path.stat() for path in sorted(files) if path.is_file()}
    return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}


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
