"""`ditbench run`: one run or a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditbench.harness.cli.flags import flags_to_overrides
from ditbench.harness.common.imports import importing

HELP = """\
usage: ditbench run [NAME=VALUE …] [-m] [--plan] [--force] [--strict] [--config-dir FOLDER] [--cfg job] [--debug]

  ditbench run method=smoothquant bits=w4a8 model=tiny-dit       one run
  ditbench run -m method=rtn,smoothquant bits=w8a8,w4a4          a sweep: every combination
  ditbench run experiment=demo                                   a sweep from a file
  ditbench run … --plan                                          what it would take, and no run

  -m                   commas make a sweep of all combinations
  --plan               operations, time, memory and disk of every run; nothing is run
  --force              runs again what is recorded (a finished run is skipped otherwise)
  --strict             refuses a run of which a metric would be skipped
  --config-dir FOLDER  configurations of your own: FOLDER/model/mine.yaml is model=mine; may be given several times
  --cfg job            prints the whole configuration and runs nothing
  --debug              tracebacks instead of short errors

Results go to ./results (results_dir=FOLDER)."""
HIDDEN = ("hydra", "sweep", "debug")  # Hydra's own, and what we set


def command(arguments: list[str]) -> int:
    """`ditbench run`: compose with Hydra, run every job, print the comparison."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(run_help([each for each in arguments if "=" in each and not each.startswith("-")]))
        return 0
    if "--plan" in arguments:
        from ditbench.harness.sweep.plan import plan

        print(plan(flags_to_overrides([argument for argument in arguments if argument != "--plan"])))
        return 0
    with importing():
        from ditbench.harness.sweep.launch import launch

    return launch(flags_to_overrides(arguments))


def run_help(overrides: Sequence[str] = ()) -> str:
    """How it is called, every group with its choices and its default, every setting with its value where nothing else is said."""
    from ditbench.harness.common.terminal import columns, wrapped
    from ditbench.harness.common.text_table import table
    from ditbench.harness.sweep.compose import composed, default_choices, groups

    usual = default_choices()
    (config,) = composed([overrides])
    choices = [
        (group, usual.get(group, "–"), ", ".join(_few(options)))
        for group, options in sorted(groups().items())
        if options
    ]
    settings = [wrapped(f"  {line}", columns()) for line in _settings(config)]
    return "\n\n".join(
        [
            HELP,
            "groups (GROUP=NAME; `ditbench list` says more of methods, models, metrics, prompts, protocols and bits)",
            table(("group", "default", "choices"), choices, indent=2),
            wrapped(
                f"settings (SECTION.NAME=VALUE) and their values with model={config['model']['name']} "
                f"method={config['method']['name']}; `ditbench run method=NAME --help` shows those of another"
            ),
            "\n".join(settings),
        ]
    )


def _few(options: list[str]) -> list[str]:
    return options if len(options) <= 80 else [*options[:6], f"… ({len(options)} in all)"]


def _settings(config: dict[str, Any]) -> list[str]:
    """A line for what stands at the top, and one for each section."""
    shown = {name: value for name, value in config.items() if name not in HIDDEN}
    top = [f"{name}={_said(value)}" for name, value in shown.items() if not isinstance(value, dict)]
    lines = ["  ".join(top)]
    for section, values in shown.items():
        if isinstance(values, dict):
            lines.append("  ".join(f"{name}={_said(value)}" for name, value in _flat(section, values)))
    return [line for line in lines if line]


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        if name == "usual":
            continue  # where a protocol takes its values from
        found += (
            _flat(f"{prefix}.{name}", value) if isinstance(value, dict) and value else [(f"{prefix}.{name}", value)]
        )
    return found


def _said(value: Any) -> str:
    """As it would be written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_said, value))}]" if isinstance(value, list) else str(value)
