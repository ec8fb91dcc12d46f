"""`ditbench data fetch`: a file is wholly there, with its published hash, or not there at all."""

from __future__ import annotations

import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from ditbench.eval.data import Data, verify
from ditbench.eval.weights import offline
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path, file_sha256, is_disk_error

TIMEOUT_S = 30.0
OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.ot"]  # the same weights again


def fetch(data: Data) -> str:
    """Fetch one entry and say where it is now; UserError with the command to do it by hand where that is not possible."""
    if data.is_here:
        verdict = verify(data)
        if verdict.ok is False:
            raise UserError(f"{data.name}: {verdict.says}")
        return f"{data.path}: already here, {verdict.says}"
    if offline():
        raise UserError(f"{data.name}: downloads are switched off (DITBENCH_OFFLINE, HF_HUB_OFFLINE)\n{_by_hand(data)}")
    try:
        _fetch_repository(data) if data.repo else _fetch_file(data)
    except HTTPError as error:  # there is a network, but no such file
        raise UserError(
            f"{data.name}: {data.address} answered {error.code} {error.reason}\n{_by_hand(data)}"
        ) from error
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{data.name}: no network ({reason})\n{_by_hand(data)}") from error
    except OSError as error:
        if is_disk_error(error):
            raise UserError(f"{data.path}: cannot be written ({error.strerror}); set DITBENCH_DATA=…") from error
        raise
    return f"{data.path}: fetched, {verify(data).says}"


def _fetch_file(data: Data) -> None:
    path = data.path
    assert data.url is not None and path is not None
    with urllib.request.urlopen(data.url, timeout=TIMEOUT_S) as answer, atomic_path(path) as part:
        with part.open("wb") as file:
            shutil.copyfileobj(answer, file)
        _check_part(data, part)


def _check_part(data: Data, part: Path) -> None:
    """Before the file takes its name: what came is what was published."""
    size_bytes, sha256 = part.stat().st_size, file_sha256(part)
    published = data.sha256 or data.sha256_prefix or ""
    if (data.size_bytes is not None and size_bytes != data.size_bytes) or not sha256.startswith(published):
        raise UserError(
            f"{data.name}: {data.url} gave {size_bytes} bytes with SHA-256 {sha256}, expected "
            f"{data.size_bytes or '?'} bytes and {published or '?'}; nothing was kept"
        )


def _fetch_repository(data: Data) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(str(data.repo), allow_patterns=list(data.only) or None, ignore_patterns=OTHER_FRAMEWORKS)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise URLError(str(error).splitlines()[0][:200]) from error


def _by_hand(data: Data) -> str:
    return f"by hand, where there is one: {data.by_hand}"
