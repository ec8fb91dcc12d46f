"""Samples on the page: the float model's beside every run's, the worst among those shown, and what stands in when they are gone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ditbench.eval.base import PerSample
from ditbench.harness.common.artifacts import Address
from ditbench.harness.records import hashed_json, sample_values
from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, gallery, report
from ditbench.harness.report.page_files import PageFiles
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.samples.store import open_store

N = 40
WORST = {"a": 31, "b": 22}


def filled(results_dir, key, pixels_N):
    prompts = tuple(Prompt(f"{row} <b>cats</b>", {"tag": "counting"}) for row in range(len(pixels_N)))
    wanted = Conditions(tuple(range(len(pixels_N))), prompts=prompts)
    store = open_store(Address(results_dir / "cache", "samples", key, "samples"), wanted, lambda: 16, False)
    for piece in store.pieces:
        store.publish(piece, pixels_N[piece.rows.start : piece.rows.stop], None, 4.0)
    return store


@pytest.fixture
def drawn(add_run, results_dir, metric):
    """drawn(shape of a sample) → the folder of results: runs a and b, whose psnr is lowest at WORST, and that fail the rule there."""

    def draw(shape=(8, 8, 3), n=N):
        noise = torch.randint(0, 200, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        filled(results_dir, "f" * 32, noise)
        for name in WORST:
            add_run(
                name, metrics={"psnr": metric(25.0, unit="dB"), "geneval_shapes/counting": metric(0.9, paired=False)}
            )
        for record in read_all(results_dir):
            key = {"a": "a", "b": "b"}[record.method] * 32
            filled(results_dir, key, noise + 10 * (1 + ord(record.method) - ord("a")))
            psnr = np.linspace(20.0, 30.0, n)
            right = np.ones(n)
            if n == N:
                psnr[WORST[record.method]], right[WORST[record.method]] = 3.0, 0.0
            found = {"psnr": PerSample(psnr), "geneval_shapes/counting": PerSample(right, yes_no=True)}
            sample_values.save(sample_values.Values(found, {}, "one"), record.folder / "per_sample.npz")
            path = record.folder / "record.json"
            values = hashed_json.read(path)
            values["made_from"] = {"samples": key, "float_samples": "f" * 32}
            del values["files"]["per_sample.npz"]
            hashed_json.write(path, hashed_json.text_of(values))
        return results_dir

    return draw


def shown(results_dir, tmp_path):
    (group,) = compare.groups(read_all(results_dir))
    files = PageFiles(tmp_path / "page.html")
    return gallery.gallery(group, files), files, group


def test_every_runs_worst_sample_is_shown_with_its_prompt_values_and_failed_rules(drawn, tmp_path):
    found, _, group = shown(drawn(), tmp_path)
    rows = [sample["row"] for sample in found["samples"]]
    assert len(rows) == gallery.SHOWN and rows[:4] == [0, 1, 2, 3] and set(WORST.values()) <= set(rows)
    for place, run in found["runs"].items():
        at = rows.index(WORST[group.records[place].method])
        assert run["values"]["psnr"][at] == "3 dB" and run["fails"][at] == ["counting"] and run["fails"][0] == []
        assert min(range(len(rows)), key=run["sort"]["psnr"].__getitem__) == at
    assert found["samples"][0]["about"] == "0 <b>cats</b> [counting]" and found["of"] == N and found["by"] == "psnr"


def test_pictures_are_the_samples_without_loss_and_the_float_models_are_there_once(drawn, tmp_path):
    found, files, _ = shown(drawn(), tmp_path)
    a, b = found["runs"].values()
    assert a["float"] == b["float"] and a["pictures"][0] != b["pictures"][0]
    inline = files.publish()["inline"]
    assert len([name for name in inline if name.startswith("samples/")]) == 3 * gallery.SHOWN
    own, reference = (
        np.array(Image.open(io.BytesIO(base64.b64decode(inline[name].partition(",")[2])))).astype(int)
        for name in (a["pictures"][0], a["float"][0])
    )
    assert (own - reference == 10).all()


def test_a_video_is_one_picture_of_all_its_frames(drawn, tmp_path):
    found, files, _ = shown(drawn((5, 16, 24, 3), n=3), tmp_path)
    assert found["video"] == {"frames": 5, "columns": 3, "height": 16, "width": 24, "fps": 4.0}
    (sheet, *_) = [Image.open(io.BytesIO(each)) for name, each in files._held.items() if name.startswith("samples/")]
    assert sheet.size == (3 * 24, 2 * 16)


def test_where_the_samples_were_deleted_the_overview_stands_in(drawn, tmp_path):
    results = drawn()
    shutil.rmtree(results / "cache" / "samples" / ("a" * 32))
    found, files, group = shown(results, tmp_path)
    by_name = {group.records[place].method: run for place, run in found["runs"].items()}
    assert by_name["a"]["why"] == gallery.GONE and by_name["a"]["overview"]["picture"] in files
    assert "pictures" in by_name["b"]


def test_a_damaged_sample_costs_itself_only(drawn, tmp_path):
    results = drawn()
    (results / "cache" / "samples" / ("a" * 32) / "000001.webp").write_bytes(b"torn")
    found, _, group = shown(results, tmp_path)
    (a,) = [run for place, run in found["runs"].items() if group.records[place].method == "a"]
    assert a["pictures"][1] is None and a["pictures"][0] and a["float"][1]


def test_a_missing_or_broken_overview_is_said_and_a_huge_one_is_scaled_down(add_run, results_dir, tmp_path):
    add_run("a")
    (record,) = read_all(results_dir)
    files = PageFiles(tmp_path / "page.html")
    (record.folder / "grid.png").write_bytes(b"not a png")
    (record.folder / "float_grid.png").unlink()
    assert gallery.overview(record, "grid", files) == {"problem": "grid.png is unreadable"}
    assert gallery.overview(record, "float_grid", files) == {"problem": "float_grid.png is missing"}
    Image.effect_noise((1600, 1600), 90).save(record.folder / "grid.png")
    record.files.clear()
    huge = gallery.overview(record, "grid", files)
    assert huge["reduced"] and len(files._held[huge["picture"]]) < gallery.OVERVIEW_MAX_BYTES


def test_samples_are_seen_beside_the_float_models_the_worst_first(drawn, browser):
    path = report(drawn(), None, "html").path
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{path.as_uri()}#view=samples")
    page.wait_for_selector(".sample img")
    first = page.locator(".sample").first
    assert (
        f"#{WORST['a']}" in first.inner_text()
        and "✗ counting" in first.inner_text()
        and "<b>cats</b>" in first.inner_text()
    )
    assert first.locator("figure").count() == 3
    page.select_option("#worst", label="b W4A8")
    assert f"#{WORST['b']}" in page.locator(".sample .about").first.inner_text() and "worst=demo" in page.url
    page.check("#difference")
    page.locator(".difference .over").first.evaluate("image => image.decode()")
    page.locator(".bare").first.click()
    assert page.locator("#dialog img").is_visible() and complaints == []
    page.close()


def until(page, condition):
    """Asked from outside: the page's own policy forbids scripts that are made of text."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


def test_videos_play_in_step(drawn, browser):
    path = report(drawn((5, 16, 24, 3), n=3), None, "html").path
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{path.as_uri()}#view=samples")
    page.wait_for_selector(".sample canvas")
    assert page.locator(".sample canvas").count() == 9
    page.click("#play")
    page.locator("#frame").fill("3")
    assert page.evaluate("clock.frame") == 3 and page.evaluate("clock.places.length") == 9
    page.wait_for_timeout(600)
    assert page.evaluate("clock.frame") == 3, "paused"
    page.click("#play")
    until(page, "clock.frame !== 3")
    page.close()


def test_what_a_page_holds_is_json_whatever_the_prompt_says(drawn):
    text = report(drawn(), None, "html").path.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert "<b>" not in data and json.loads(data)["files"]["inline"]["groups/0"]["gallery"]["samples"][0][
        "about"
    ].startswith("0 <b>")


def test_values_of_a_metric_whose_file_is_damaged_are_not_shown(add_run, results_dir, metric):
    from ditbench.harness.records.attempts import read_all
    from ditbench.harness.report.whole import values_with

    add_run("a", metrics={"psnr": metric(20.0), "ssim": metric(0.5)})
    (record,) = read_all(results_dir)
    assert values_with(record, "ssim") is not None
    del record.metrics["ssim"]
    assert values_with(record, "ssim") is None
