"""`ditbench doctor`: what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from ditbench.harness.backends.matrix import format_matrix
from ditbench.harness.cli.flags import Parser, folder
from ditbench.harness.common.code_identity import PACKAGES, package_version
from ditbench.harness.common.devices import AUTO, device_name, kinds_here, pick_device
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import options
from ditbench.harness.common.text_table import table
from ditbench.harness.fitting import registry
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.records.trackers import wandb


def examine(results_dir: Path) -> str:
    parts = [
        ("device", _device()),
        ("packages", "  ".join(f"{name} {package_version(name) or 'MISSING'}" for name in PACKAGES)),
        ("kernels", format_matrix()),
        ("methods", _methods()),
        ("models", table(("model", "weights"), [(path.stem, _weights(path)) for path in options("model")])),
        ("metrics", _metrics()),
        ("W&B", _wandb()),
        ("results", _results(results_dir)),
    ]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()) for title, text in parts)


def _device() -> str:
    taken = pick_device(AUTO)
    lines = []
    for device in kinds_here():
        about = [f"{device.type}: {device_name(device)}"]
        if device.type == "cpu":
            about.append(torch.backends.cpu.get_cpu_capability())
        if device.type == "cuda":
            about.append(f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB")
        lines.append(", ".join(about) + f"; device={AUTO if device.type == taken.type else device.type} takes it")
    return "\n".join(lines)


def _methods() -> str:
    """Which can be run as they were published, and which have other forms."""
    names: dict[str, list[str]] = {}
    for name in registry.known_methods():
        names.setdefault(", ".join(registry.forms_of(name)), []).append(name)
    return table(("forms", "methods"), [(forms, ", ".join(found)) for forms, found in names.items()])


def _weights(path: Path) -> str:
    spec = yaml.safe_load(path.read_text())
    if "source" not in spec:
        return "as its base model"
    if spec.get("random") is not None:
        return "random, nothing to fetch"
    source = spec["source"]
    if source.startswith("zoo:"):
        folder = WEIGHTS / source.removeprefix("zoo:")
        return "shipped" if (folder / "model_index.json").exists() else f"missing: ditbench zoo train {folder.name}"
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "model_index.json", revision=spec.get("revision")), str):
        return f"{source} in the hub cache"
    return f"not here: `hf download {source} --local-dir DIR`, then model.source=DIR"


def _metrics() -> str:
    """Every registered metric, those together that need the same; then others' data."""
    from ditbench.eval.base import known_metrics
    from ditbench.eval.data import known_data
    from ditbench.eval.needs import lacking

    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for metric in known_metrics().values():
        alike.setdefault((tuple(lacking(metric)), metric.asks), []).append(metric.name)
    rows = [
        (
            "missing" if problems else "ready",
            _folded(names) + (f" (of a run: {', '.join(asks)})" if asks else ""),
            *problems,
        )
        for (problems, asks), names in sorted(alike.items(), key=lambda group: bool(group[0][0]))
    ]
    lines = []
    for state, names, *problems in rows:
        lines.append(f"{state.ljust(8)} {names}")
        lines += [f"{' ' * 9}{problem}" for problem in problems]
    here = [name for name, data in known_data().items() if data.is_here]
    lines.append(f"of others' data: {', '.join(here) or 'nothing'} here; `ditbench data list` names what there is")
    lines.append(
        "reference sets: digits-1797 and mnist-1000 are shipped; others by metrics.reference=FILE.npz (ADM's format) or a folder"
    )
    return "\n".join(lines)


def _folded(names: Iterable[str]) -> str:
    """a/{x, y}, b, c: names of one library together."""
    by_library: dict[str, list[str]] = {}
    for name in names:
        library, _, last = name.rpartition("/")
        by_library.setdefault(library, []).append(last)
    plain = by_library.pop("", [])
    folded = [
        f"{library}/{{{', '.join(last)}}}" if last[1:] else f"{library}/{last[0]}"
        for library, last in by_library.items()
    ]
    return ", ".join(plain + folded)


def _wandb() -> str:
    try:
        mode = wandb.mode("auto")
    except UserError as error:
        return str(error)
    if mode == "disabled":
        return "WANDB_MODE or WANDB_DISABLED says disabled: W&B hears of no run"
    if mode == "offline" and not wandb.has_key():
        return "no key: runs are logged offline beside their records; `wandb login` sets one"
    if mode == "offline":
        return "WANDB_MODE says offline: runs are logged beside their records"
    return "runs go online (tracker.mode=offline keeps them here)"


def _results(results_dir: Path) -> str:
    existing = next(parent for parent in [results_dir.resolve(), *results_dir.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = "writable" if os.access(existing, os.W_OK) else "NOT WRITABLE: set results_dir=…"
    return f"{results_dir.resolve()}: {writable}, {free:.1f} GiB free"


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench doctor", description="What this machine can do.")
    parser.add_argument("--results-dir", type=folder, default=Path("results"))
    parser.add_argument("--debug", action="store_true")

    print(examine(parser.parse_args(arguments).results_dir))
    return 0
