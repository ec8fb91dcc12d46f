"""`ditbench doctor`: what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import yaml

from ditbench.harness.backends.matrix import format_matrix, machine_lacks
from ditbench.harness.cli.flags import Parser, folder
from ditbench.harness.common.code_identity import PACKAGES, package_version
from ditbench.harness.common.devices import AUTO, device_name, kinds_here, pick_device
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import options
from ditbench.harness.common.terminal import columns, wrapped
from ditbench.harness.common.text_table import table
from ditbench.harness.fitting import registry
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.records.trackers import wandb

MISSING_HERE = "missing: "

INDENT = 2


def examine(results_dir: Path) -> str:
    parts = [
        ("missing", _missing(results_dir)),
        ("device", _device()),
        ("packages", _wrapped("  ".join(f"{name} {package_version(name) or 'MISSING'}" for name in PACKAGES))),
        ("kernels", format_matrix(INDENT)),
        ("methods", _methods()),
        ("models", _models()),
        ("metrics", _metrics()),
        ("W&B", _wrapped(_wandb())),
        ("results", _wrapped(_results(results_dir))),
    ]
    return "\n\n".join(f"{title}\n{text}" for title, text in parts)


def _missing(results_dir: Path) -> str:
    """A line for each thing that is not here and that a command gets, what most depends on first."""
    rows = [
        (f"the package {name}", f"pip install {name}", "ditbench") for name in PACKAGES if not package_version(name)
    ]
    if not _is_writable(results_dir):
        rows.append(("a folder for results", "results_dir=FOLDER", f"every run: {results_dir} may not be written"))
    rows += [(str(lack), lack.mend, f"{', '.join(formats)} in real kernels") for lack, formats in machine_lacks()]
    rows += [
        (f"weights of {path.stem}", its.removeprefix(MISSING_HERE), f"model={path.stem}")
        for path in options("model")
        if (its := _weights(path)).startswith(MISSING_HERE)
    ]
    for problem, metrics in _problems_of_metrics().items():
        what, command = _what_and_command(problem)
        rows.append((what, command, _some(metrics)))
    if not rows:
        return f"{' ' * INDENT}nothing"
    sizes = [max(len(row[place]) for row in rows) for place in range(3)]
    left = columns() - INDENT - 2 * 2 - sizes[1]  # a command is never cut
    sizes[2] = min(sizes[2], max(left // 3, 12))
    cut = [(_cut(what, left - sizes[2]), command, _cut(of, sizes[2])) for what, command, of in rows]
    return table(("what", "command", "for"), cut, indent=INDENT)


def _problems_of_metrics() -> dict[str, list[str]]:
    """What metrics lack → who lacks it."""
    from ditbench.eval.base import known_metrics
    from ditbench.eval.needs import lacking

    found: dict[str, list[str]] = {}
    for metric in known_metrics().values():
        for problem in lacking(metric):
            found.setdefault(problem, []).append(metric.name)
    by_command: dict[str, tuple[str, list[str]]] = {}
    for problem, metrics in found.items():  # two may say it in other words
        first, named = by_command.setdefault(_what_and_command(problem)[1] or problem, (problem, []))
        named += metrics
    return dict(by_command.values())


def _what_and_command(problem: str) -> tuple[str, str]:
    """Of "… are not here; `command`", as `eval/needs.py` and others say it."""
    said = re.search(r"`([^`]+)`|fetch it with: (.+)$", problem)
    what = re.split(r" (?:is|are) (?:not|missing)|;", problem)[0]
    return what, (said[1] or said[2]) if said else ""


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _wrapped(text: str) -> str:
    return "\n".join(wrapped(f"{' ' * INDENT}{line}") for line in text.splitlines())


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
    return _wrapped("\n".join(lines))


def _methods() -> str:
    """Which can be run as they were published, and which have other forms."""
    names: dict[str, list[str]] = {}
    for name in registry.known_methods():
        names.setdefault(", ".join(registry.forms_of(name)), []).append(name)
    return table(("forms", "methods"), [(forms, ", ".join(found)) for forms, found in names.items()], indent=INDENT)


def _models() -> str:
    rows = [(path.stem, _weights(path)) for path in options("model")]
    how = "on the hub: `hf download ID --local-dir DIR`, then model.source=DIR (model.source=ID where the hub can be reached)"
    return table(("model", "weights"), rows, indent=INDENT) + "\n" + _wrapped(how)


def _weights(path: Path) -> str:
    spec = yaml.safe_load(path.read_text())
    if "source" not in spec:
        return "as its base model"
    if spec.get("random") is not None:
        return "random, nothing to fetch"
    source = spec["source"]
    if source.startswith("zoo:"):
        folder = WEIGHTS / source.removeprefix("zoo:")
        return (
            "shipped" if (folder / "model_index.json").exists() else f"{MISSING_HERE}ditbench zoo train {folder.name}"
        )
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "model_index.json", revision=spec.get("revision")), str):
        return f"{source} in the hub cache"
    return f"on the hub: {source}"


def _metrics() -> str:
    """Every registered metric, those together that need the same; then others' data."""
    from ditbench.eval.base import known_metrics
    from ditbench.eval.data import known_data
    from ditbench.eval.needs import lacking

    alike: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for metric in known_metrics().values():
        alike.setdefault((bool(lacking(metric)), metric.asks), []).append(metric.name)
    rows = [
        ("missing" if problems else "ready", ", ".join(asks) or "nothing", _folded(names))
        for (problems, asks), names in sorted(alike.items(), key=lambda group: group[0][0])
    ]
    lines = [table(("", "a run must have", "metrics"), rows, indent=INDENT)]
    said = []
    here = [name for name, data in known_data().items() if data.is_here]
    said.append(f"of others' data: {', '.join(here) or 'nothing'} here; `ditbench data list` names what there is")
    said.append(
        "reference sets: digits-1797 and mnist-1000 are shipped; others by metrics.reference=FILE.npz (ADM's format) or a folder"
    )
    return "\n".join([*lines, *map(_wrapped, said)])


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
    free = shutil.disk_usage(_existing(results_dir)).free / 2**30
    writable = "writable" if _is_writable(results_dir) else "NOT WRITABLE: set results_dir=…"
    return f"{results_dir.resolve()}: {writable}, {free:.1f} GiB free"


def _existing(results_dir: Path) -> Path:
    return next(parent for parent in [results_dir.resolve(), *results_dir.resolve().parents] if parent.exists())


def _is_writable(results_dir: Path) -> bool:
    return os.access(_existing(results_dir), os.W_OK)


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench doctor", description="What this machine can do.")
    parser.add_argument("--results-dir", type=folder, default=Path("results"))
    parser.add_argument("--debug", action="store_true")

    print(examine(parser.parse_args(arguments).results_dir))
    return 0
