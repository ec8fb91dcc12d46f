"""Weights & Biases: every attempt at a run is a W&B run, an experiment is a group.

The files of W&B lie in <experiment>/wandb, beside the runs' folders: a run works in a scratch folder that is renamed when it is
recorded, or removed when it is not, and W&B writes from the first moment to the last. What continues an attempt continues its
W&B run: online by its id, offline in a folder of its own (offline-run-<time>-<id>) that `wandb sync` puts behind the first.
"""

from __future__ import annotations

import netrc
import os
import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.trackers.base import Card, Movie, Picture, Table, Value

PACKAGE, EXTRA = "wandb", ""
MODES = {name: name for name in ("online", "offline", "disabled", "shared")} | {"run": "online", "dryrun": "offline"}
HOSTS = (
    "api.wandb.ai",
    "api.forge.coreweave.com",
)  # where `wandb login` notes a key for; older releases know the first only
INIT_S = 20.0  # a server that does not answer within this is given up; W&B's own default is 90
SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,  # of the working directory, which may be anybody's; ditbench's own commit is in the config
    "init_timeout": INIT_S,
    "finish_timeout": 60.0,
    "x_transaction_log_flush_interval": 2.0,  # so that who reads the file of an offline run sees where it is
    "x_graphql_retry_max": 3,
    "x_file_stream_retry_max": 3,
    "x_file_transfer_retry_max": 3,
}
STEPS_PER_S = 10
FOLDER = re.compile(r"^(?:offline-)?run-(?P<start>\d{8}_\d{6})-(?P<id>.+)$")


def is_on(settings: Mapping[str, Any]) -> bool:
    return mode(settings["mode"]) != "disabled"


def begin(settings: Mapping[str, Any], card: Card) -> WandbRun:
    import wandb

    known = wandb.Settings.model_fields  # W&B adds some of these over time
    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=card.group,
        job_type=card.job_type,
        name=card.title,
        tags=[tag[:64] for tag in card.tags],  # W&B takes no longer ones
        id=card.id,
        resume="allow",
        config=card.config,
        mode=mode(settings["mode"]),
        dir=str(card.home),
        reinit="finish_previous",
        settings=wandb.Settings(**{name: value for name, value in SETTINGS.items() if name in known}),
    )
    return WandbRun(run, first_seen(card))


class WandbRun:
    """W&B's step is the time since the run was first seen, in tenths of a second: it grows, also over a restart that knows of no
    other. (In whole seconds, what is logged more often than that runs ahead of the clock, and a restart would fall behind it.)
    """

    def __init__(self, run: Any, first_seen_s: float) -> None:
        self.run, self.first_seen_s, self.last = run, first_seen_s, int(run.step) - 1

    def log(self, values: Mapping[str, Value]) -> None:
        self.last = max(self.last + 1, int((time.time() - self.first_seen_s) * STEPS_PER_S))
        self.run.log({name: _shown(value) for name, value in values.items()}, step=self.last, commit=True)

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:128], type=kind)  # all that W&B takes
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def finish(self, status: str, error: str | None) -> None:
        import wandb

        try:
            self.run.summary.update({"status": status} | ({"error": error} if error else {}))
        finally:
            self.run.finish(exit_code=0 if status == "ok" else 1)
            wandb.teardown()  # finish() returns before W&B's own process has closed the file; this waits for it


def first_seen(card: Card) -> float:
    """When the oldest of W&B's folders of this attempt was made, in seconds since 1970; now, if there is none."""
    ours = [path for path in folders(card.home) if id_of(path) == card.id]
    return datetime.strptime(_parts(ours[0])["start"], "%Y%m%d_%H%M%S").timestamp() if ours else time.time()


def folders(home: Path) -> list[Path]:
    """W&B's folders of an experiment, oldest first: those beside its runs, and those that ditbench once kept inside them."""
    found = [path for pattern in ("wandb/*run-*", "*/wandb/*run-*") for path in home.glob(pattern)]
    return sorted((path for path in found if FOLDER.match(path.name)), key=lambda path: _parts(path)["start"])


def id_of(path: Path) -> str:
    """Of the attempt that one of W&B's folders is about."""
    return _parts(path)["id"]


def mode(wanted: str) -> str:
    """What is said here counts before the environment: only auto asks WANDB_DISABLED and WANDB_MODE, then whether W&B knows a key
    (online) or not (offline).

    Raises:
        UserError: WANDB_MODE is none of W&B's modes.
    """
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = os.environ.get("WANDB_MODE", "").lower()
    if not said:
        return "online" if has_key() else "offline"
    if said not in MODES:
        raise UserError(f"WANDB_MODE is {said!r}, expected one of {', '.join(MODES)}; set it, or tracker.mode=offline")
    return MODES[said]


def has_key() -> bool:
    """Whether `wandb login` has been done here, or WANDB_API_KEY is set."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    said = os.environ.get("WANDB_BASE_URL")
    hosts = (said.split("//")[-1].split("/")[0],) if said else HOSTS
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _parts(path: Path) -> re.Match[str]:
    match = FOLDER.match(path.name)
    assert match, "only `folders` gives them"
    return match


def _shown(value: Any) -> Any:
    import wandb

    if isinstance(value, Picture):
        image = value.image
        return wandb.Image(str(image) if isinstance(image, Path) else image, caption=value.caption or None)
    if isinstance(value, Movie):
        return wandb.Video(str(value.path), format="gif")
    if isinstance(value, Table):
        rows = [[_shown(cell) for cell in row] for row in value.rows]
        return wandb.Table(columns=list(value.columns), data=rows, allow_mixed_types=True)  # a plugin may say anything
    return [_shown(each) for each in value] if isinstance(value, list) else value
