"""One self-contained page: libraries, styles, data and pictures inside; where pictures would be many, they lie in a folder beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ditbench.harness.common.files import atomic_path, disk_errors_explained
from ditbench.harness.report.compare import Group
from ditbench.harness.report.contests import BITS
from ditbench.harness.report.page_data import page_data
from ditbench.harness.report.page_files import PageFiles, compact

HERE = Path(__file__).parent
VIEWS = HERE / "views"
TABULATOR = HERE / "vendor" / "tabulator"
SCRIPTS = ("page", "paper", "answer", "runs", "pinned", "samples", "layers", "trust", "start")
# Nothing is fetched from anywhere; scripts and pictures of the folder beside are the page's own, whether opened from a disk or a server.
ALONE = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
WITH_FOLDER = "default-src 'none'; img-src data: blob: 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'self' file:"


def write_page(
    out: Path,
    groups: Sequence[Group],
    experiment: str | None,
    damaged: Sequence[str] = (),
    at: str = BITS,
    paper: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, and `<out's stem>_files` beside it if there is much to show. at: which ranks are shown first. paper: a table of a
    paper and ours, shown before all else.

    Raises:
        UserError: the disk takes nothing; a folder of that name is there that no page made.
    """
    files = PageFiles(out)
    with disk_errors_explained(out.parent):
        try:
            data = page_data(groups, files, at, damaged)
            data |= {"files": files.publish(), "paper": paper}
        finally:
            files.discard()
        title = f"ditbench · {experiment}" if experiment else "ditbench · all experiments"
        with atomic_path(out) as part:
            part.write_text(_html(title, data, WITH_FOLDER if data["files"]["beside"] else ALONE), encoding="utf-8")


def _html(title: str, data: dict, policy: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(VIEWS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        policy=Markup(policy),
        style=Markup((TABULATOR / "tabulator_simple.min.css").read_text() + (VIEWS / "style.css").read_text()),
        script=Markup("\n".join((VIEWS / f"{name}.js").read_text() for name in SCRIPTS)),
        tabulator=Markup((TABULATOR / "tabulator.min.js").read_text()),
        plotly=Markup(get_plotlyjs()),
        data=Markup(in_script(compact(data))),
    )


def in_script(json: str) -> str:
    """JSON that can stand in a script element: no record's text ends it."""
    return json.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
