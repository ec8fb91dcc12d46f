"""The page is one file that asks for nothing, and works: opened in a headless, offline Chromium."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, report
from ditbench.harness.report.figures import NOT_MEASURED, figures
from ditbench.harness.report.html import IMAGE_MAX_BYTES, picture
from ditbench.harness.report.whole import OF_A_PAGE, whole_records


@pytest.fixture
def open_page(browser):
    """open_page(path, **context) → (page, what it complained of, what it asked the network for)."""
    contexts = []

    def opened(path, **settings):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}} | settings)
        contexts.append(context)
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(120_000)  # the page holds plotly; a busy machine takes its time
        page.goto(path.as_uri())
        return page, complaints, [url for url in requests if not url.startswith(("data:", "blob:", path.as_uri()))]

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def html(sweep):
    return report(sweep, "demo", "html").path


def own_markup(path):
    """The page without plotly.js, whose source holds addresses that are never asked for."""
    return re.sub(r"<script>/\*\*.*?</script>", "", path.read_text(), flags=re.DOTALL)


def test_the_file_has_its_place_and_every_run_and_metric(html, sweep):
    assert html == sweep / "report-demo.html" and not list(sweep.glob(".report*"))
    markup = own_markup(html)
    assert len(markup) < 1_000_000
    assert len(re.findall(r"<tr class=.*? data-bits=", markup)) == 20
    for text in (
        "0123456789ab with uncommitted changes",
        "diffusers 0.39.0</dd>",
        "2026-11-20",
        "(stress: outliers x32)",
        "saw no calibration batch",
    ):
        assert text in markup


def test_nothing_in_the_markup_is_fetched(html):
    markup = own_markup(html)
    assert not re.search(r"""(src|href|srcset|action)\s*=\s*["']?\s*(https?:|//)|url\(|@import|<link|<iframe""", markup)


def test_what_a_record_says_cannot_become_markup(add_run, results_dir, metric):
    add_run("a", note="</script><script>alert(1)</script>", metrics={"psnr": metric(20.0)})
    add_run("b", "W8A8", error="<img src=x onerror=alert(1)>")
    markup = own_markup(report(results_dir, None, "html").path)
    assert "<script>alert" not in markup and "<img src=x" not in markup


def test_the_page_works_in_a_browser_without_a_network(html, open_page):
    page, complaints, requests = open_page(html)
    page.wait_for_selector("#plot-latency .scatterlayer .point")
    assert page.locator("#plot-size .scatterlayer .point").count() > 5
    assert page.locator("[data-layers] .heatmaplayer image").count() == 2
    assert page.locator("#layers .heatmaplayer image").count() == 4, "and one over the steps beside each"
    page.locator("[data-steps-of]").first.select_option(index=1)
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 23 and all(width == 128 for width in widths)  # 17 runs, float beside each of 6 rows
    page.select_option("#pick-metric", "psnr")
    page.wait_for_function("document.querySelector('#plot-size .ytitle').textContent.includes('psnr')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert complaints == [] and requests == []


def test_a_header_sorts_by_click_and_by_key(html, open_page):
    page, complaints, _ = open_page(html)
    table = page.locator("table.results").nth(1)
    sqnr = table.locator("thead th", has_text="sqnr")

    def column(title="sqnr"):
        place = [text.split()[0] for text in table.locator("thead tr:last-child th").all_inner_texts()].index(title)
        return [text.split()[0] for text in table.locator(f"tbody tr > :nth-child({place + 1})").all_inner_texts()]

    before = column()
    assert {len(text) for text in before} >= {4, 5}  # 5.00 and 11.00: as text they would sort the other way
    sqnr.locator("button").click()
    numbers = [float(text) for text in column() if text != "–"]
    assert column() != before and numbers == sorted(numbers, reverse=True)  # higher is better: best on top
    assert column()[-2:] == ["–", "–"] and sqnr.get_attribute("aria-sort") == "descending"
    sqnr.locator("button").focus()
    page.keyboard.press("Enter")
    numbers = [float(text) for text in column() if text != "–"]
    assert numbers == sorted(numbers) and column()[-2:] == ["–", "–"]
    assert sqnr.get_attribute("aria-sort") == "ascending"
    assert table.locator("thead th[aria-sort=ascending], thead th[aria-sort=descending]").count() == 1
    table.locator("thead th", has_text="method").locator("button").click()
    assert column("method") == sorted(column("method"))
    assert complaints == []


def test_noise_and_marks_are_visible_in_the_table(html, open_page):
    page, _, _ = open_page(html)
    table = page.locator("table.results").first
    assert table.locator("td.inside").first.inner_text().startswith("~")
    grey, ink = (
        table.locator(f"tbody tr:not(.float) {cell}").first.evaluate("cell => getComputedStyle(cell).color")
        for cell in ("td.inside", "td:not(.inside)")
    )
    assert grey != ink
    assert marked(table) and not marked(table, "tr.float")


def marked(table, rows="tr", weight="700"):
    """Of these rows the values that are shown in bold: [(run, value)]."""
    return table.locator(f"tbody {rows}").evaluate_all(
        """(rows, weight) => rows.flatMap(row => [...row.querySelectorAll('td .value')]
            .filter(value => getComputedStyle(value).fontWeight === weight).map(value => [row.cells[0].innerText, value.innerText]))""",
        weight,
    )


def test_the_page_can_rank_runs_of_nearly_equal_bytes(add_run, results_dir, metric, open_page):
    """W4A8 `heavy` stores as much as W8A8 `a`: the best of its label, and not of its bytes."""
    for method, bits, psnr, size in (("a", "W8A8", 40.0, 900), ("b", "W4A8", 20.0, 500), ("heavy", "W4A8", 30.0, 880)):
        add_run(method, bits, metrics={"psnr": metric(psnr)}, efficiency={"model_bytes": size * 2**10})
    page, complaints, _ = open_page(report(results_dir, None, "html").path)
    table = page.locator("table.results").first
    assert marked(table) == [["heavy", "30.00"]]
    assert page.locator("details.only-bits").is_visible() and not page.locator("details.only-bytes").is_visible()
    page.select_option("#pick-ranks", "bytes")
    assert marked(table) == [["a", "40.00"]]
    runs = table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.cells[0].innerText)")
    assert runs == ["b", "heavy", "a"]
    assert table.locator("tr.new-contest").count() == 1 and complaints == []
    page.select_option("#pick-ranks", "bits")
    assert marked(table) == [["heavy", "30.00"]]


@pytest.mark.parametrize("settings", [{"viewport": {"width": 400, "height": 800}}, {"color_scheme": "dark"}])
def test_it_fits_a_phone_and_turns_dark(html, open_page, settings):
    page, complaints, _ = open_page(html, **settings)
    page.wait_for_selector("#plot-size .scatterlayer .point")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and complaints == []
    if settings.get("color_scheme") == "dark":
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"


def test_tables_images_and_reasons_need_no_javascript(html, open_page):
    page, _, _ = open_page(html, java_script_enabled=False)
    assert page.locator("table.results").first.is_visible() and page.locator("#problems code").is_visible()
    assert page.locator("#samples img").first.is_visible() and page.get_by_text("plots need JavaScript").is_visible()
    assert not page.locator("#plot-size").is_visible()


def test_a_sweep_in_which_everything_failed_still_makes_a_page(add_run, results_dir, open_page):
    add_run("a", error="ValueError: one")
    add_run("b", error="ValueError: two")
    page, complaints, _ = open_page(report(results_dir, None, "html").path)
    assert page.locator("#problems li").count() == 2 and page.locator("#no-metric").is_visible()
    assert complaints == []


def test_runs_that_have_a_floor_each_share_no_band(add_run, results_dir, fid):
    add_run("fp", "W16A16", metrics={"fid": fid(30.0)})
    for method, floor in (("a", 0.2), ("b", 0.5)):
        add_run(method, metrics={"fid": fid(30.3, floor)})
    (group,) = compare.groups(read_all(results_dir))
    assert figures(group)["size"]["fid"]["layout"]["shapes"] == []


def test_simulated_runs_are_not_in_the_latency_plot(add_run, results_dir, metric, fid):
    metrics = {"fid": fid(30.0), "psnr": metric(20.0)}
    add_run("fp", "W16A16", metrics={"fid": fid(30.0)})
    add_run("a", metrics=metrics, efficiency={"latency_ms": {"median": 1.0, "p10": 1.0, "p90": 1.0}})
    (group,) = compare.groups(read_all(results_dir))
    drawn = figures(group)
    plot = drawn["latency"]["fid"]
    assert [trace["name"] for trace in plot["data"]] == ["fp (bf16)"]
    assert plot["layout"]["annotations"][0]["text"] == NOT_MEASURED
    assert drawn["latency"]["psnr"]["data"] == []
    (band,) = drawn["size"]["fid"]["layout"]["shapes"]
    assert (band["y0"], band["y1"]) == (26.0, 34.0)
    assert drawn["size"]["psnr"]["layout"]["shapes"] == []
    add_run("b", "W8A8", metrics=metrics, measured=True)
    (group,) = compare.groups(read_all(results_dir))
    plot = figures(group)["latency"]["psnr"]
    assert [trace["name"] for trace in plot["data"]] == ["b", "W8A8"] and "annotations" not in plot["layout"]


def test_the_heat_map_leaves_a_gap_where_a_layer_stayed_in_float(add_run, results_dir):
    record = add_run("a")
    del record.layers["transformer_blocks.1.ff.net.2"]
    record.folder = None
    (group,) = compare.groups([record, add_run("b")])
    (heatmap,) = figures(group)["layers"]["data"]
    row = heatmap["z"][heatmap["y"].index("transformer_blocks.1.ff.net.2")]
    assert heatmap["x"] == ["a<br>W4A8", "b<br>W4A8"] and row[0] is None and row[1] is not None


def test_a_missing_or_broken_image_is_said_and_a_huge_one_is_scaled_down(add_run, results_dir):
    add_run("a")
    (record,) = read_all(results_dir)
    (record.folder / "grid.png").write_bytes(b"not a png")
    (record.folder / "float_grid.png").unlink()
    assert picture(record, "grid", "a", "").problem == "grid.png is unreadable"
    assert picture(record, "float_grid", "float", "").problem == "float_grid.png is missing"
    page = own_markup(report(results_dir, None, "html").path)
    assert "grid.png is unreadable" in page and "float_grid.png is missing" in page
    Image.effect_noise((1600, 1600), 90).save(record.folder / "grid.png")
    record.files.clear()
    huge = picture(record, "grid", "a", "")
    assert huge.reduced and max(huge.size) == 1024 and len(huge.uri) < IMAGE_MAX_BYTES


def test_the_step_heat_map_holds_the_atlas_beside_the_record(add_run, results_dir):
    add_run("rtn", "W4A4")
    ((run, figure),) = figures(compare.groups(read_all(results_dir))[0])["steps"].items()
    (heatmap,) = figure["data"]
    assert run == "rtn W4A4" and heatmap["x"] == ["0", "9", "19"] and heatmap["z"][1] == [3.0, 4.0, 5.0]


def test_an_unreadable_atlas_only_leaves_its_heat_map_out(add_run, results_dir):
    record = add_run("rtn", "W4A4")
    (results_dir / "runs" / record.experiment / record.run_id / "layer_errors.npz").write_bytes(b"torn")
    records, damaged = whole_records(results_dir, None, OF_A_PAGE)
    assert figures(compare.groups(records)[0])["steps"] == {}
    assert len(damaged) == 1 and "layer_errors.npz" in damaged[0]
