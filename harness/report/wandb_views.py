"""An experiment's dashboards in W&B, as code: a saved view of the project, and a report.

Made with wandb-workspaces (the extra `ditbench[workspaces]`); they name values as `records/told.py` does. Nothing is sent until
`save` is called; `spec` is what would be sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ditbench.harness.records.record import Record

MOST_METRICS = 12
BYTES, LATENCY = "efficiency/model_bytes", "efficiency/latency_ms/median"
COLUMNS = ("bits/weight_bits_effective", "bits/act_bits_effective", BYTES, "efficiency/kind", LATENCY, "status")
SAMPLES = ("samples/beside_float", "samples/grid", "samples/float_grid", "samples/first", "samples/first_float")
LIVE = ("live/share", "live/samples_per_s", "live/stage_number", "live/device_memory_bytes")
METHOD, BITS = "method_name", "bits_label"


def metrics_of(records: Iterable[Record]) -> list[str]:
    """The metrics that any of them has a value of, in the order in which they were asked for."""
    named = [name for record in records for name, entry in record.metrics.items() if entry.get("value") is not None]
    return list(dict.fromkeys(named))[:MOST_METRICS]


def workspace(entity: str, project: str, experiment: str, metrics: Sequence[str]) -> Any:
    """A saved view of the experiment's runs: a table of method × bits, quality against bytes and latency, samples, layers."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, panels=panels, is_open=index < 4)
        for index, (name, panels) in enumerate(_panels(metrics).items())
    ]
    columns = [f"config:{METHOD}.value", f"config:{BITS}.value", *(f"summary:metrics/{name}" for name in metrics)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=experiment,
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == experiment],
            groupby=[ws.Config(METHOD), ws.Config(BITS)],
            order=[ws.Ordering(ws.Metric("Name"), ascending=True)],
            pinned_columns=[*columns, *(f"summary:{name}" for name in COLUMNS)],
        ),
    )


def report(entity: str, project: str, experiment: str, metrics: Sequence[str], look_up: bool = True) -> Any:
    """The same panels under headings. look_up: name the project to its panels, for which W&B is asked; the report's own otherwise."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.P(
            f"Runs of the ditbench experiment {experiment}. Values have 95 % intervals (…/ci95_low, …/ci95_high), n, and "
            "passports in the table metrics_table of each run; which differences are more than chance, "
            "`ditbench report` and `ditbench compare` say."
        ),
        wr.TableOfContents(),
    ]
    for name, panels in _panels(metrics).items():
        runs = wr.Runset(
            entity=entity if look_up else "",
            project=project if look_up else "",
            name=experiment,
            filters=f"Group = {json.dumps(experiment)}",
            groupby=[f"config.{METHOD}", f"config.{BITS}"],
        )
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity, project=project, title=f"ditbench: {experiment}"[:128], blocks=blocks, width="fluid"
    )


def spec(made: Any) -> dict[str, Any]:
    """What W&B would be sent of a view or a report. It has no public name in wandb-workspaces 0.4."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def _panels(metrics: Sequence[str]) -> dict[str, list[Any]]:
    """{heading: panels}."""
    import wandb_workspaces.reports.v2 as wr

    def against(what: str) -> list[Any]:
        return [
            wr.ScatterPlot(title=name, x=wr.SummaryMetric(what), y=wr.SummaryMetric(f"metrics/{name}"))
            for name in metrics
        ]

    return {
        "Method × bits": [
            wr.BarPlot(title=name, metrics=[wr.SummaryMetric(f"metrics/{name}")], orientation="h") for name in metrics
        ],
        "Quality against bytes": against(BYTES),
        "Quality against latency": against(LATENCY),
        "Samples": [wr.MediaBrowser(title=name, media_keys=[name]) for name in SAMPLES],
        "Layers": [
            wr.MediaBrowser(title="SQNR by layer and step", media_keys=["layer_errors"]),
            wr.WeavePanelSummaryTable(table_name="layers_by_step"),
        ],
        "While they run": [wr.LinePlot(title=name, y=[name]) for name in LIVE],
    }
