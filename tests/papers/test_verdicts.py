"""Paper and record compared: within, outside, or not comparable and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditbench.harness.papers import reported
from ditbench.harness.papers.reproduce import rows, verdicts
from ditbench.harness.papers.schema import Reproduce, Row
from ditbench.harness.records.record import Record


@pytest.mark.parametrize(
    ("paper", "ours", "ci95", "tolerance", "expected"),
    [
        (7.09, 7.60, (7.05, 8.15), 0.3, "within"),  # in the interval, further than the tolerance
        (7.09, 7.35, (7.30, 7.40), 0.3, "within"),  # outside of the interval, closer than the tolerance
        (7.09, 7.60, (7.30, 7.90), 0.3, "outside"),
        (7.09, 6.60, (6.50, 6.70), 0.3, "outside"),
        (7.09, 7.60, None, 0.3, "outside"),
        (7.09, 7.25, None, 0.25, "within"),
    ],
)
def test_a_verdict_is_within_by_interval_or_by_tolerance(paper, ours, ci95, tolerance, expected):
    assert verdicts.verdict(paper, ours, ci95, tolerance) == expected


def test_a_reason_comes_before_any_number():
    assert verdicts.verdict(7.0, 7.0, (6.9, 7.1), 0.3, ["model", "n"]) == "not comparable: model, n"


def config(**changes):
    made = {
        "model": {"name": "dit-xl-2-256", "source": "hub", "random": None, "stress": None},
        "protocol": {"name": "ptq4dit", "n": 10000, "steps": 250, "sampler": "ddpm", "skip": []},
        "method": {"name": "ptq4dit", "parts": "csb+ssc"},
        "bits": {"label": "w4a8", "weight": {"bits": 4}, "act": {"bits": 8}},
        "calibration": {"n": 32, "batch_size": 32},
        "generate": {"dtype": "float32", "batch_size": 64},
    }
    for name, value in changes.items():
        part, key = name.split("__")
        made[part] = made[part] | {key: value}
    return made


def test_settings_that_differ_are_reasons_and_where_the_weights_lie_is_none():
    assert verdicts.departures(config(), config()) == {}
    same = config(model__source="/here", generate__batch_size=8, calibration__batch_size=4, protocol__name="mine")
    assert verdicts.departures(same, config()) == {}
    assert verdicts.departures(config(protocol__n=5000, method__parts="none", bits__act={"bits": 4}), config()) == {
        "n": "5000, not 10000",
        "method.parts": "none, not csb+ssc",
        "bits.act.bits": "4, not 8",
    }
    assert verdicts.departures(config(protocol__skip=["qkv"]), config()) == {"skip": "['qkv'], not []"}
    assert verdicts.departures(config(model__stress={"seed": 0}), config())


@pytest.mark.parametrize(
    ("metric", "reference", "expected"),
    [
        ("torch_fidelity/fid", "real.npz", set()),
        ("torch_fidelity/is", None, set()),  # IS has no reference
        ("torch_fidelity/fid", "other.npz", {"reference"}),
        ("torch_fidelity/fid_judge", "digits", {"features", "reference"}),
    ],
)
def test_another_evaluator_is_a_reason(metric, reference, expected):
    wanted = metric.removesuffix("_judge")
    assert set(verdicts.evaluator_departures(metric, wanted, {"reference": reference}, "real.npz")) == expected


def a_record(value: float | None, status: str = "ok") -> Record:
    entry = {
        "value": value,
        "ci95": None if value is None else [value - 0.1, value + 0.1],
        "reason": "no weights" if value is None else None,
        "passport": {"reference": "VIRTUAL_imagenet256_labeled.npz"},
    }
    metrics = dict.fromkeys(("torch_fidelity/fid", "torch_fidelity/is", "torch_fidelity/precision"), entry)
    return Record("0" * 12, status, config(), "ptq4dit", "dit-xl-2-256", "x", error="broke", metrics=metrics)


def judged(row: Row, record: Record | None, refusal: str | None = None, **section) -> verdicts.Judged:
    asked = replace(reported.table("ptq4dit-table1").reproduce, **section)
    return verdicts.judged_row(rows.Line(row, ("a",), ("a",)), asked, record, refusal, config())["FID"]


def row(fid: float | None = 7.09, confidence: str = "primary") -> Row:
    return Row({"method": "PTQ4DiT"}, {"FID": fid, "sFID": 1.0, "IS": 1.0, "Precision": 1.0}, confidence, "s")


def test_a_run_like_the_papers_is_judged_by_its_numbers():
    assert judged(row(), a_record(7.0)).verdict == "within"
    assert judged(row(), a_record(9.17)).verdict == "outside"


def test_what_was_not_computed_says_why():
    assert judged(row(), a_record(None)).verdict == "not computed: no weights"
    assert judged(row(), a_record(7.0, status="failed")).verdict == "failed: broke"
    assert judged(row(), None, "no w4a8").verdict == "refused: no w4a8"
    assert judged(row(None), a_record(7.0)).verdict == "the paper prints no value"


def test_what_a_row_lacks_is_its_verdict():
    line = rows.Line(row(), None, None, ("method TFMQ-DM", "format NVFP4"))
    cells = verdicts.judged_row(line, reported.table("ptq4dit-table1").reproduce, None)
    assert {cell.verdict for cell in cells.values()} == {"not here: method TFMQ-DM, format NVFP4"}


def test_a_value_from_memory_is_never_confirmed():
    assert judged(row(confidence="recall"), a_record(7.09)).verdict == "not comparable: confidence"


def test_ours_is_brought_to_the_papers_scale_with_its_interval():
    cell = judged(row(709.0), a_record(7.09), scale={"FID": 100})
    assert cell.ours == pytest.approx(709.0) and cell.ci95 == pytest.approx([699.0, 719.0])
    assert cell.verdict == "within"


def test_what_the_section_says_cannot_be_as_in_the_paper_makes_a_number_not_comparable():
    assert judged(row(), a_record(7.09), departs={"prompts": "others"}).verdict == "not comparable: prompts"
    of_column = judged(row(), a_record(7.09), departs={"FID": "another Inception"})
    assert of_column.reasons == {"evaluator": "FID: another Inception"}
    assert judged(row(), a_record(7.09), departs={"IS": "another Inception"}).verdict == "within"


def test_a_model_that_is_not_here_is_a_reason():
    section = reported.table("svdquant-table1").reproduce
    line = rows.Line(Row({"model": "SDXL"}, {"MJHQ_PSNR": 20.0}, "primary", "s"), ("a",), None)
    record = replace(a_record(None), metrics={"psnr": {"value": 20.0, "ci95": [19.0, 21.0]}})
    assert verdicts.judged_row(line, section, record)["MJHQ_PSNR"].reasons["model"] == "dit-xl-2-256, not SDXL"


def test_an_exact_reader_stands_in_for_the_detector_and_says_so():
    section = Reproduce({}, {"Total": "geneval/overall"}, {"Total": 0.02}, model="pixart-alpha-xl-2-512")
    record = replace(a_record(None), metrics={"geneval_shapes/overall": {"value": 0.5, "ci95": [0.4, 0.6]}})
    line = rows.Line(Row({"method": "FP"}, {"Total": 0.55}, "secondary", "s"), ("a",), ("a",))
    cell = verdicts.judged_row(line, section, record, None, config())["Total"]
    assert (cell.ours, cell.verdict) == (0.5, "not comparable: evaluator")
