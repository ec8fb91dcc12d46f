"""A run whose samples collapsed has no rank and is named; videos move in the gallery."""

from __future__ import annotations

import pytest
from PIL import Image

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, gallery, marks, report
from ditbench.harness.report.page_files import PageFiles


def collapse(metric, **shares) -> dict:
    """An entry of the metric `collapse` whose alarms were raised by these shares of the samples."""
    entry = metric(max(shares.values()), better="lower")
    alarms = {name: {"share": share, "n": 64} for name, share in shares.items()}
    alarmed = [name for name, share in shares.items() if share > 0.1]
    return entry | {"passport": {"alarms": alarms, "alarmed": alarmed}}


@pytest.fixture
def runs(add_run, results_dir, metric):
    """The blank run has the best psnr of all."""
    add_run("blank", metrics={"psnr": metric(40.0), "collapse": collapse(metric, blank=0.75, frozen=0.02)})
    add_run("good", metrics={"psnr": metric(30.0), "collapse": collapse(metric, blank=0.02)})
    add_run("worse", metrics={"psnr": metric(20.0), "collapse": collapse(metric, blank=0.0)})
    return results_dir


def test_a_collapsed_run_has_no_rank_and_the_others_keep_theirs(runs):
    (group,) = compare.groups(read_all(runs))
    found = {
        run.method: verdict.mark for run, verdict in zip(group.records, marks.verdicts(group, "psnr"), strict=True)
    }
    assert found == {"blank": "", "good": "best", "worse": "second"}


def test_only_alarms_of_too_many_samples_are_named_with_their_share(runs):
    found = {record.method: compare.alarms(record) for record in read_all(runs)}
    assert found == {"blank": ["blank 75%"], "good": [], "worse": []}


@pytest.mark.parametrize("form", ["md", "html"])
def test_the_report_names_the_collapsed_run_and_no_other(runs, form):
    made = report(runs, None, form)
    text = made.path.read_text() if made.path else made.text
    assert "blank W4A8 not ranked, samples collapsed: blank 75% of them" in text
    assert text.count("W4A8 not ranked") == 1


def test_without_its_videos_a_run_shows_its_animation_beside_the_float_models(add_run, results_dir, tmp_path):
    add_run("rtn")
    (record,) = read_all(results_dir)
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 120, 240)]
    for name in ("animation", "float_animation"):
        first = frames[0] if name == "animation" else Image.new("RGB", (16, 16), "blue")
        first.save(record.folder / f"{name}.gif", save_all=True, append_images=frames[1:], duration=100)
    record.artifacts |= {"animation": "animation.gif", "float_animation": "float_animation.gif"}
    (group,) = compare.groups([record])
    (run,) = gallery.gallery(group, PageFiles(tmp_path / "page.html"))["runs"].values()
    pictures = [run[name]["picture"] for name in ("overview", "float_overview")]
    assert all(name.endswith(".gif") for name in pictures) and len(set(pictures)) == 2


def test_a_collapsed_run_is_never_called_like_the_float_model(add_run, results_dir, metric, fid):
    """Whether its number lies inside the noise floor or not."""
    add_run("fp", "W16A16", metrics={"fid": fid(20.0)})
    for method, share in (("good", 0.0), ("blank", 0.75)):
        add_run(method, metrics={"fid": fid(20.5, floor=4.0), "collapse": collapse(metric, blank=share)})
    (group,) = compare.groups(read_all(results_dir))
    found = {run.method: its.inside for run, its in zip(group.records, marks.verdicts(group, "fid"), strict=True)}
    assert found == {"fp": None, "good": True, "blank": None}
