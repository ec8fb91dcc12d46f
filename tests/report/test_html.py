"""The page holds every run and asks for nothing, and works: opened in a headless, offline Chromium."""

from __future__ import annotations

import json
import re

import pytest

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, figures, fronts, html, layers, page_files, report
from ditbench.harness.report.whole import OF_A_PAGE, whole_records


@pytest.fixture
def open_page(browser):
    """open_page(path, hash, **context) → (page, what it complained of, what it asked the network for)."""
    contexts = []

    def opened(path, state="", **settings):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}} | settings)
        contexts.append(context)
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(120_000)  # the page holds plotly; a busy machine takes its time
        page.goto(f"{path.as_uri()}#{state}")
        outside = [url for url in requests if not url.startswith(("data:", "blob:", path.parent.as_uri()))]
        return page, complaints, outside

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def page_of(sweep):
    return report(sweep, "demo", "html").path


def data_in(path):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found)


def own_markup(path):
    """The page without the libraries, whose source holds addresses that are never asked for."""
    text = path.read_text()
    for library in re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL):
        text = (
            text.replace(library, "")
            if len(library) > 300_000
            and "plotly" in library[:9000].lower() + library[-9000:].lower()
            or "Tabulator v" in library[:200]
            else text
        )
    return text


def test_the_file_has_its_place_and_every_run_metric_and_reason(page_of, sweep):
    assert page_of == sweep / "report-demo.html" and not list(sweep.glob(".report*"))
    assert not (sweep / "report-demo_files").exists(), "little to show: it is inside"
    data = data_in(page_of)
    assert len(data["rows"]) == 20 and data["counts"] == {"ok": 19, "failed": 1, "skipped": 0}
    assert {"accuracy", "clean_fid/fid", "torchmetrics/fid_judge"} <= {column["key"] for column in data["columns"]}
    said = dict(data["provenance"])
    assert said["git"] == "0123456789ab with uncommitted changes" and "diffusers 0.39.0" in said["versions"]
    assert "2026-11-20" in said["date"] and any("(stress: outliers x32)" in each["label"] for each in data["groups"])
    (problem,) = [problem for each in data["groups"] for problem in each["problems"]]
    assert "saw no calibration batch" in problem["why"] and problem["command"].startswith("ditbench run ")


def test_numbers_marks_and_ranks_are_those_of_the_table(add_run, results_dir, metric):
    """W4A8 `heavy` stores as much as W8A8 `a`: the best of its label, and not of its bytes."""
    for method, bits, psnr, size in (("a", "W8A8", 40.0, 900), ("b", "W4A8", 20.0, 500), ("heavy", "W4A8", 30.0, 880)):
        add_run(method, bits, metrics={"psnr": metric(psnr)}, efficiency={"model_bytes": size * 2**10})
    rows = {row["name"]: row for row in data_in(report(results_dir, None, "html").path)["rows"]}
    cells = {name: row["cells"]["psnr"] for name, row in rows.items()}
    assert {name: cell["t"] for name, cell in cells.items()} == {"a": "40.00", "b": "20.00", "heavy": "30.00"}
    assert {name: (cell.get("b", ""), cell.get("y", "")) for name, cell in cells.items()} == {
        "a": ("", "best"),
        "b": ("second", ""),
        "heavy": ("best", "second"),
    }
    assert sorted(rows, key=lambda name: rows[name]["place"]["bytes"]) == ["b", "heavy", "a"]


def test_nothing_in_the_markup_is_fetched(page_of):
    markup = own_markup(page_of)
    assert len(markup) < 1_000_000
    assert not re.search(
        r"""(src|href|srcset|action)\s*=\s*["']?\s*(https?:|//)|url\(|@import|<link|<iframe|fetch\(""", markup
    )


def test_what_a_record_says_cannot_become_markup(add_run, results_dir, metric, open_page):
    evil = "<img src=x onerror=window.pwned=1>"
    add_run("a", note="</script><script>window.pwned=1</script>", metrics={"psnr": metric(20.0), evil: metric(1.0)})
    add_run(evil, "W8A8", metrics={"psnr": metric(30.0), evil: metric(1.0)}, experiment="other", stress=evil)
    add_run(evil, "W4A4", error=evil)
    path = report(results_dir, None, "html").path
    assert "<img src=x" not in own_markup(path) and "<script>window" not in own_markup(path)
    page, complaints, _ = open_page(path)
    for view in ("answer", "runs", "samples", "layers", "trust"):
        page.click(f"#tab-{view}")
        page.wait_for_selector(f"#{view}:not([hidden])")
    page.locator("#trust button.run").first.click()
    page.wait_for_selector("#dialog .metrics")
    assert page.evaluate("window.pwned") is None and page.locator("img[src=x]").count() == 0
    assert complaints == []


def test_what_to_ship_is_said_and_drawn_first(page_of, open_page):
    page, complaints, outside = open_page(page_of)
    page.wait_for_selector("#plot-size .scatterlayer .point")
    verdict = page.locator(".verdict").inner_text()
    assert "By size, " in verdict and "By speed on cpu (2 cores), " in verdict
    assert "At W4A4 hadamard stays closest to the float model" in page.locator("#conclusions").inner_text()
    assert page.locator("#front tbody tr").count() >= 2
    assert page.locator("#plot-size .textpoint text").count() >= 2, "points have their names"
    page.select_option("#metric", "torchmetrics/fid_judge")
    page.locator("#plot-size .ytitle", has_text="fid_judge").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert complaints == [] and outside == []


def rows_of(page):
    return page.locator("#grid .tabulator-row:not(.tabulator-group) button.run:not(.status)").all_inner_texts()


def values_of(page, field):
    texts = page.locator(f'#grid .tabulator-row:not(.tabulator-group) [tabulator-field="{field}"]').all_inner_texts()
    return [text.split("\n")[0].strip("~") for text in texts]


def test_runs_are_filtered_found_and_sorted_and_the_address_says_so(page_of, open_page):
    page, complaints, _ = open_page(page_of, "view=runs&bits=W8A8&model=tiny-dit")
    page.wait_for_selector("html[data-grid]")
    assert rows_of(page) == ["balance", "hadamard", "rtn"]
    head = page.locator('#grid .tabulator-col[tabulator-field="psnr"]')
    head.click()
    found = [float(text) for text in values_of(page, "psnr")]
    assert found == sorted(found, reverse=True) and len(found) == 3, "higher is better: the best on top"
    head.focus()
    page.keyboard.press("Enter")
    assert [float(text) for text in values_of(page, "psnr")] == sorted(found)
    assert "sort=psnr%3Aasc" in page.url
    page.fill("#find", "hada")
    page.locator("#count", has_text="1 of 20").wait_for()
    address = page.url
    again, _, _ = open_page(page_of, address.partition("#")[2])
    again.wait_for_selector("html[data-grid]")
    assert rows_of(again) == ["hadamard"]
    assert complaints == []


def test_what_has_no_value_stays_last_either_way(add_run, results_dir, metric, open_page):
    for name, psnr in (("a", 20.0), ("b", None), ("c", 110.0)):
        add_run(name, metrics={"psnr": metric(psnr), "ssim": metric(0.5)})
    page, _, _ = open_page(report(results_dir, None, "html").path, "view=runs")
    page.wait_for_selector("html[data-grid]")
    head = page.locator('#grid .tabulator-col[tabulator-field="psnr"]')
    head.click()
    assert values_of(page, "psnr")[-1] == "–" and rows_of(page) == ["c", "a", "b"]
    head.click()
    assert rows_of(page) == ["a", "c", "b"]


def test_columns_can_be_chosen(page_of, open_page):
    page, complaints, _ = open_page(page_of, "view=runs")
    page.wait_for_selector("html[data-grid]")
    place = page.locator('#grid .tabulator-col[tabulator-field="sqnr"]')
    assert not place.is_visible()
    page.click("details.menu:has-text('columns') summary")
    page.check("details.menu input[value='sqnr']")
    assert place.is_visible() and "sqnr" in page.url and complaints == []


def marked(page, css, field="psnr"):
    return page.locator(f'#grid [tabulator-field="{field}"] .{css}').all_inner_texts()


def test_the_ranks_of_the_page_can_be_those_of_equal_bytes(add_run, results_dir, metric, open_page):
    for method, bits, psnr, size in (("a", "W8A8", 40.0, 900), ("b", "W4A8", 20.0, 500), ("heavy", "W4A8", 30.0, 880)):
        add_run(method, bits, metrics={"psnr": metric(psnr)}, efficiency={"model_bytes": size * 2**10})
    page, complaints, _ = open_page(report(results_dir, None, "html").path, "view=runs")
    page.wait_for_selector("html[data-grid]")
    assert marked(page, "best") == ["30.00"]
    page.select_option("#ranks", "bytes")
    assert marked(page, "best") == ["40.00"] and rows_of(page) == ["b", "heavy", "a"]
    page.select_option("#ranks", "bits")
    assert marked(page, "best") == ["30.00"] and complaints == []


def test_two_runs_are_pinned_and_compared_with_keys_alone(page_of, open_page):
    page, complaints, _ = open_page(page_of, "view=runs&bits=W4A8&model=tiny-dit")
    page.wait_for_selector("html[data-grid]")
    page.focus("#grid")
    for key in ("ArrowDown", "p", "ArrowDown", "p"):
        page.keyboard.press(key)
    page.wait_for_selector("#pinned .pair")
    line = page.locator("#pinned .pair tr", has_text="psnr").inner_text()
    assert "balance − hadamard: −1.7" in line and "p (Holm) < 0.001" in line
    differing = page.locator("#pinned table").nth(1).locator("tr").all_inner_texts()
    assert [line.split("\t") for line in differing] == [
        ["setting", "balance W4A8", "hadamard W4A8"],
        ["method.name", '"balance"', '"hadamard"'],
    ]
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog .command")
    assert "ditbench run model=tiny-dit method=hadamard bits=w4a8" in page.locator("#dialog .command").inner_text()
    assert "null" not in page.locator("#dialog > *:not(details)").all_inner_texts()
    page.keyboard.press("Escape")
    assert not page.locator("#dialog").is_visible() and complaints == []


@pytest.mark.parametrize("view", ["answer", "runs", "samples", "layers", "trust"])
@pytest.mark.parametrize("settings", [{"viewport": {"width": 400, "height": 800}}, {"color_scheme": "dark"}])
def test_every_view_fits_a_phone_and_turns_dark(page_of, open_page, settings, view):
    page, complaints, _ = open_page(page_of, f"view={view}", **settings)
    page.wait_for_selector(f"#{view}:not([hidden]) *")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and complaints == []
    if settings.get("color_scheme") == "dark":
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_layers_are_drawn_with_the_worst_named(page_of, open_page):
    page, complaints, _ = open_page(page_of, "view=layers")
    page.wait_for_selector("#plot-steps .heatmaplayer image")
    assert page.locator("#layers .heatmaplayer image").count() == 2
    first = page.locator(".worst tbody tr").first.inner_text()
    assert "transformer_blocks" in first and "dB" in first and complaints == []


def test_problems_and_damage_are_listed_with_the_command_to_go_on(page_of, open_page):
    page, complaints, _ = open_page(page_of)
    page.click(".lead a")
    assert "saw no calibration batch" in page.locator("#problems code").first.inner_text()
    assert "ditbench run" in page.locator("#problems .command").inner_text()
    assert "pip install clean-fid" in page.locator(".passports").inner_text() and complaints == []


def test_without_javascript_the_page_says_what_to_do(page_of, open_page):
    page, _, _ = open_page(page_of, java_script_enabled=False)
    assert page.get_by_text("This page needs JavaScript").is_visible()


def test_a_sweep_in_which_everything_failed_still_makes_a_page(add_run, results_dir, open_page):
    add_run("a", error="ValueError: one")
    add_run("b", error="ValueError: two")
    page, complaints, _ = open_page(report(results_dir, None, "html").path)
    assert page.locator("#no-front").is_visible()
    for view in ("runs", "samples", "layers", "trust"):
        page.click(f"#tab-{view}")
    page.wait_for_selector("#problems li >> nth=1")
    assert page.locator("#problems li").count() == 2 and complaints == []


def test_what_is_much_lies_in_a_folder_beside_and_is_loaded_when_shown(sweep, open_page, monkeypatch):
    monkeypatch.setattr(page_files, "INLINE_MAX_BYTES", 1000)
    path = report(sweep, "demo", "html").path
    folder = sweep / "report-demo_files"
    assert data_in(path)["files"] == {"beside": "report-demo_files", "inline": {}} and list(folder.glob("runs/*.js"))
    page, complaints, outside = open_page(path, "view=layers")
    page.wait_for_selector("#plot-steps .heatmaplayer image")
    page.click("#tab-samples")
    page.locator("img.overview").first.evaluate("image => image.decode()")
    page.click("#tab-trust")
    page.locator("#trust button.run").first.click()
    page.wait_for_selector("#dialog .metrics")
    assert complaints == [] and outside == []
    monkeypatch.undo()
    report(sweep, "demo", "html")
    assert not folder.exists(), "a smaller page leaves none of it"


def test_a_folder_that_no_page_made_is_left_alone(sweep, tmp_path):
    folder = sweep / "report-demo_files"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(page_files.UserError, match="no page made"):
        report(sweep, "demo", "html")
    assert (folder / "mine.txt").exists()


def test_the_libraries_say_whose_they_are(page_of):
    folder = html.HERE / "vendor" / "tabulator"
    version = re.search(r"Tabulator v([\d.]+)", (folder / "tabulator.min.js").read_text()[:200])[1]
    assert "MIT" in (folder / "LICENSE").read_text() and f"| {version} |" in (folder.parent / "README.md").read_text()


def test_simulated_runs_have_no_speed_front(add_run, results_dir, metric, fid):
    add_run("fp", "W16A16", metrics={"fid": fid(30.0)})
    add_run("a", metrics={"fid": fid(30.0)}, efficiency={"speedup": 2.0, "latency_ms": {"median": 1.0}})
    (group,) = compare.groups(read_all(results_dir))
    assert [front.against for front in fronts.fronts(group, "fid")] == ["size"]


def test_runs_that_have_a_floor_each_share_no_band(add_run, results_dir, fid):
    add_run("fp", "W16A16", metrics={"fid": fid(30.0, None)})
    add_run("a", metrics={"fid": fid(30.3, 0.5)})
    (group,) = compare.groups(read_all(results_dir))
    (front,) = fronts.fronts(group, "fid")
    (band,) = figures.front_figure(group, "fid", front)["layout"]["shapes"]
    assert (band["y0"], band["y1"]) == (29.5, 30.5)
    add_run("b", metrics={"fid": fid(30.3, 0.2)})
    (group,) = compare.groups(read_all(results_dir))
    assert figures.front_figure(group, "fid", fronts.fronts(group, "fid")[0])["layout"]["shapes"] == []


def test_labels_of_points_cover_neither_points_nor_each_other():
    spots = figures.label_spots([(1.0, 1.0), (1.0, 1.02), (2.0, 2.0)], ["one W4A4", "two W4A4", "far W8A8"], True)
    assert None not in spots and spots[0] != spots[1]
    crowd = figures.label_spots([(1.0, 1.0)] * 12 + [(2.0, 2.0)], ["the same place"] * 13, True)
    assert 0 < crowd.count(None) < 12


def test_the_heat_map_leaves_a_gap_where_a_layer_stayed_in_float(add_run, results_dir):
    record = add_run("a")
    del record.layers["transformer_blocks.1.ff.net.2"]
    record.folder = None
    (group,) = compare.groups([record, add_run("b")])
    (heatmap,) = layers.layer_heatmap(group)["data"]
    row = heatmap["z"][heatmap["y"].index("transformer_blocks.1.ff.net.2")]
    assert heatmap["x"] == ["a<br>W4A8", "b<br>W4A8"] and row[0] is None and row[1] is not None


def test_the_step_heat_map_holds_the_atlas_beside_the_record(add_run, results_dir):
    add_run("rtn", "W4A4")
    (heatmap,) = layers.step_heatmap(compare.groups(read_all(results_dir))[0].records[0])["data"]
    assert heatmap["x"] == ["0", "9", "19"] and heatmap["z"][1] == [3.0, 4.0, 5.0]


def test_an_unreadable_atlas_only_leaves_its_heat_map_out(add_run, results_dir):
    record = add_run("rtn", "W4A4")
    (results_dir / "runs" / record.experiment / record.run_id / "layer_errors.npz").write_bytes(b"torn")
    records, damaged = whole_records(results_dir, None, OF_A_PAGE)
    assert layers.step_heatmap(records[0]) is None
    assert len(damaged) == 1 and "layer_errors.npz" in damaged[0]


def test_the_worst_layers_come_first(add_run, results_dir):
    record = add_run("rtn", "W4A4")
    found = [float(row[1].split()[0]) for row in layers.worst(record)]
    assert found == sorted(found) and found[0] == round(min(each["sqnr_db"] for each in record.layers.values()), 1)


def test_a_bit_plan_stands_beside_uniform_runs_of_its_bytes(add_run, results_dir, metric):
    for bits, psnr, size in (("W4A4", 20.0, 500), ("W8A8", 40.0, 900), ("W6A6", 30.0, 620)):
        add_run("rtn", bits, metrics={"psnr": metric(psnr, unit="dB")}, efficiency={"model_bytes": size * 2**10})
    add_run("other", "W6A6", metrics={"psnr": metric(31.0)}, efficiency={"model_bytes": 600 * 2**10})
    plan = {
        "plan": {"a": "w4a4", "b": "w8a8"},
        "budget": {"average_weight_bits": 6},
        "predicted": {"average_weight_bits": 5.9},
    }
    record = add_run("rtn", "W5A5", metrics={"psnr": metric(33.0)}, efficiency={"model_bytes": 600 * 2**10})
    (group,) = compare.groups([*(r for r in read_all(results_dir) if r.run_id != record.run_id), record])
    record.bits |= {"mixed": plan, "label": "mixed-5.9"}
    found = layers.plan_of(group, group.records.index(record), 0)
    assert [row[0] for row in found["rows"]] == ["rtn mixed-5.9", "rtn W6A6"], "within 10 %, of the same method"
    assert found["layers"] == [["a", "W4A4"], ["b", "W8A8"]] and found["budget"] == "average weight bits ≤ 6"
    for each in group.records:
        if compare.bits_label(each) == "W6A6":
            each.efficiency["model_bytes"] = None
    found = layers.plan_of(group, group.records.index(record), 0)
    assert [row[0] for row in found["rows"][1:]] == ["rtn W4A4", "rtn W8A8"], "the next smaller and the next larger"
