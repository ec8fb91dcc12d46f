"""A paper's table on the page: opened in a headless, offline Chromium."""

from __future__ import annotations

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import page


def view_of(run):
    rows = [
        {"cells": ["W4A8", "RTN", "FID", "30.1", "29.9", "-0.2", "±1.0", "within"], "run": run, "kind": "within"},
        {"cells": ["W4A8", "RTN", "IS", "9", "5", "-4", "±1", "outside"], "run": run, "kind": "outside"},
        {
            "cells": ["W4A8", "<b>Theirs</b>", "FID", "28", "–", "–", "–", "not here: method"],
            "run": None,
            "kind": "not here",
        },
    ]
    header = ["bits", "method", "metric", "paper", "ours", "Δ", "interval", "verdict"]
    return {
        "title": "mine · a paper", "summary": "3 values", "header": header, "names": 2, "rows": rows, "notes": ["a note"],
    }  # fmt: skip


def test_the_table_stands_first_and_its_rows_open_their_runs(sweep, browser, tmp_path):
    records = [record for record in read_all(sweep) if record.experiment == "demo"]
    run = next(record for record in records if record.method == "rtn")
    keys = [f"{record.experiment}/{record.run_id}" for record in records]
    made = page(sweep, "demo", tmp_path / "page.html", keys, view_of(keys[records.index(run)]))
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    opened, complaints = context.new_page(), []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.set_default_timeout(120_000)
    opened.goto(made.as_uri())
    opened.wait_for_selector("#paper table.paper")
    assert opened.locator("nav button").first.inner_text() == "Paper"
    assert opened.locator("table.paper tbody").count() == 2, "one block for each row of the paper"
    assert opened.locator("td.said.within").inner_text() == "within"
    assert opened.locator("td.said.outside").inner_text() == "outside"
    assert "<b>Theirs</b>" in opened.locator("table.paper tbody").nth(1).inner_text()
    opened.locator("table.paper button.link").click()
    assert run.run_id in opened.locator("dialog").inner_text()
    context.close()
    assert complaints == []
