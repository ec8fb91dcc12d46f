"""`ditbench wandb`: what Weights & Biases was told offline is sent, and dashboards of an experiment are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder
from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError, first_words, unknown_name


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench wandb", description="What Weights & Biases is told of runs.")
    both = Parser(add_help=False)
    both.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    both.add_argument("--debug", action="store_true")
    actions = parser.add_subparsers(dest="action", required=True)
    sync = actions.add_parser("sync", parents=[both], help="send what was logged offline, of runs that no longer go on")
    sync.add_argument("experiment", nargs="*", help="default: all")
    sync.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    views = actions.add_parser("workspace", parents=[both], help="save a view of an experiment's runs, and a report")
    views.add_argument("experiment")
    views.add_argument("--entity", help="default: that of the experiment's runs, else W&B's own")
    views.add_argument("--project", help="default: that of the experiment's runs")
    views.add_argument("--out", type=folder, help="write what would be sent into this folder, and send nothing")
    options = parser.parse_args(arguments)
    if options.action == "sync":
        return send(options.results_dir, options.experiment, options.dry_run)
    return dashboards(options.results_dir, options.experiment, options.entity, options.project, options.out)


def send(results_dir: Path, experiments: list[str], dry_run: bool) -> int:
    from ditbench.harness.records.trackers import wandb
    from ditbench.harness.records.tracking import is_told

    homes = homes_of(results_dir, experiments)
    offline = [path for home in homes for path in wandb.folders(home) if path.name.startswith("offline-")]
    waiting = [path for path in offline if not synced(path)]
    told = {path for path in waiting if is_told(path.parents[1], wandb.id_of(path))}
    going = [path for path in waiting if path not in told]
    rest = f"; {len(told)} of runs that go on are left for later" if told else ""
    if dry_run or not going:
        print(
            "\n".join(
                [*map(str, going), f"{len(going)} folders to send, {len(offline) - len(waiting)} sent before{rest}"]
            )
        )
        return 0
    if not wandb.has_key():
        raise UserError(f"{len(going)} folders to send, and W&B knows no key here: `wandb login` first")
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_DISABLED")}
    subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, going)], env=environment, check=False)
    sent = [path for path in going if synced(path)]
    print(f"sent: {len(sent)} of {len(going)} folders{rest}")
    return 0 if len(sent) == len(going) else EXIT_FAILED_RUNS


def synced(path: Path) -> bool:
    """Whether `wandb sync` has left its mark."""
    return any(path.glob("*.wandb.synced"))


def homes_of(results_dir: Path, experiments: list[str]) -> list[Path]:
    """Raises UserError: an experiment is not there."""
    known = {path.name: path for path in sorted((results_dir / "runs").glob("*")) if path.is_dir()}
    for name in experiments:
        if name not in known:
            raise unknown_name(f"experiment in {results_dir}/runs:", name, known)
    return [known[name] for name in experiments or known]


def dashboards(results_dir: Path, experiment: str, entity: str | None, project: str | None, out: Path | None) -> int:
    from ditbench.harness.records.attempts import read_all
    from ditbench.harness.records.trackers.wandb import has_key
    from ditbench.harness.report import wandb_views

    if find_spec("wandb_workspaces") is None:
        raise UserError("wandb-workspaces is not installed; pip install 'ditbench[workspaces]'")
    homes_of(results_dir, [experiment])
    records = read_all(results_dir, experiment)
    if not records:
        raise UserError(
            f"{results_dir}/runs/{experiment} holds no finished run yet: which metrics are there is not known"
        )
    sections = [record.config.get("tracker") or {} for record in records]
    entity = entity or next((each["entity"] for each in sections if each.get("entity")), None)
    project = project or next((each["project"] for each in sections if each.get("project")), "ditbench")
    metrics = wandb_views.metrics_of(records)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        view = wandb_views.workspace(entity or "", project, experiment, metrics)
        report = wandb_views.report(entity or "", project, experiment, metrics, look_up=False)
        for name, made in (("workspace", view), ("report", report)):
            path = out / f"{name}.json"
            path.write_text(json.dumps(wandb_views.spec(made), indent=1, ensure_ascii=False))
            print(path)
        return 0
    if not has_key():
        raise UserError("W&B knows no key here: `wandb login` first, or --out FOLDER to look at what would be sent")
    try:
        if entity is None:
            import wandb

            entity = str(wandb.Api().default_entity)
        print(wandb_views.workspace(entity, project, experiment, metrics).save().url)
        print(wandb_views.report(entity, project, experiment, metrics).save().url)
    except Exception as error:  # wandb-workspaces has no error of its own for what a server refuses
        raise UserError(f"W&B did not take the dashboards of {experiment}: {first_words(error)}") from error
    return 0
