"""Every bit of a record and of the files beside it, and odd values in every field: named, and nothing else is lost."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from ditbench.eval.base import PerSample
from ditbench.harness.records import hashed_json, sample_values, schema
from ditbench.harness.records.attempts import attempt
from ditbench.harness.records.record import Record, read, write
from ditbench.harness.report import report
from ditbench.harness.report.whole import OF_A_PAGE, whole_records

OLD = Path(__file__).parent / "553773a" / "runs" / "old"


@pytest.fixture
def recorded(tmp_path) -> Record:
    """A small record, as it is written today, with a file beside it."""
    entry = {"value": 1.5, "ci95": [1.0, 2.0], "n": 4, "status": "ok", "reason": None, "passport": {"version": "é 1"}}
    entry |= {"better": "higher", "paired": True, "unit": "dB", "noise_floor": None}
    ours = Record("0" * 12, "ok", {"seed": 0}, "rtn", "m", "e", metrics={"psnr": entry})
    ours.artifacts = {"per_sample": "per_sample.npz"}
    with attempt(tmp_path, "e", ours.run_id) as this:
        values = sample_values.Values({"psnr": PerSample(np.arange(4.0))}, {}, "drawn")
        sample_values.save(values, this.folder / "per_sample.npz")
        return this.publish(ours)


def test_a_flipped_bit_of_a_record_is_named_wherever_it_is(recorded):
    """One bit of each byte, and every bit of the hash."""
    path = recorded.folder / "record.json"
    whole = path.read_bytes()
    unnoticed = []
    bits = {8 * place + place % 8 for place in range(len(whole))} | set(range(8 * len(whole) - 800, 8 * len(whole)))
    for bit in sorted(bits):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            hashed_json.read(path)
            unnoticed.append(bit)
        except hashed_json.NotWhole:
            pass
    assert unnoticed == []


def test_each_truncation_of_a_record_is_named(recorded):
    path = recorded.folder / "record.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):  # the last byte is a line's end
        path.write_bytes(whole[:length])
        with pytest.raises(hashed_json.NotWhole):
            hashed_json.read(path)


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "empty", "other content"])
@pytest.mark.parametrize("artifact", ["per_sample", "layer_errors", "grid"])
def test_a_damaged_file_beside_a_record_is_listed_and_the_report_goes_on(tmp_path, artifact, kind):
    shutil.copytree(OLD, tmp_path / "runs" / "old")
    paths = sorted(tmp_path.glob("runs/old/*/record.json"))
    for path in paths:  # as written today, with hashes
        write(read(path), path.parent)
    (first, *_) = [read(path) for path in paths if artifact in read(path).artifacts and read(path).method != "fp"]
    file = first.folder / first.artifacts[artifact]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {"flipped bit": content, "truncated": content[:40], "empty": b"", "other content": b"x" * len(content)}
    file.write_bytes(damaged[kind])
    for format in ("md", "html"):
        made = report(tmp_path, None, format)
        text = made.path.read_text() if made.path else made.text
        assert "htg" in text and "rtn" in text
        expected = artifact == "per_sample" or format == "html"
        assert [str(file) in line for line in made.damaged] == [True] * expected


@pytest.mark.parametrize("artifact", ["per_sample", "layer_errors"])
def test_files_without_a_hash_are_never_more_than_unreadable(tmp_path, artifact):
    """As older versions wrote them: 400 flipped bits, each either unseen, for want of a hash, or listed."""
    shutil.copytree(OLD, tmp_path / "runs" / "old")
    (path, *_) = [p for p in sorted(tmp_path.glob("runs/old/*")) if (p / f"{artifact}.npz").exists()]
    file = path / f"{artifact}.npz"
    whole, draw = file.read_bytes(), random.Random(0)
    listed = 0
    for _ in range(400):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        records, damaged = whole_records(tmp_path, None, OF_A_PAGE)
        assert len(records) == 3 and len(damaged) <= 1
        listed += len(damaged)
    assert listed > 200, "zip files have checksums of their own"


ODD = (None, True, 3, -1.5, "odd", "", [], {}, [[1]], {"a": {"b": None}}, 10**400, float("nan"))


def places(node, path=()):
    """Every place of a record, to a representative one of long lists and of layers."""
    yield path
    pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, each in pairs[:2] if path[:1] in (("layers",), ("env",)) or isinstance(node, list) else pairs:
        yield from places(each, (*path, key))


def test_odd_values_in_any_place_of_a_record_cost_a_report_at_most_that_record(tmp_path, monkeypatch):
    """Without a hash, as whoever writes a record by hand does."""
    shutil.copytree(OLD, tmp_path / "runs" / "old")
    monkeypatch.setattr("ditbench.harness.report.html.get_plotlyjs", lambda: "")
    path = next(
        p for p in sorted(tmp_path.glob("runs/old/*/record.json")) if json.loads(p.read_text())["method"] == "htg"
    )
    values, draw = json.loads(path.read_text()), random.Random(0)
    cases = [(place, odd) for place in places(values) if place for odd in ODD]
    broken = []
    for place, odd in draw.sample(cases, 100):
        changed = copy.deepcopy(values)
        node = changed
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = odd
        path.write_text(json.dumps(changed))
        for format in ("md", "csv", "latex", "html"):
            try:
                made = report(tmp_path, None, format)
            except Exception as error:
                broken.append((place, odd, format, repr(error)))
                continue
            text = made.path.read_text() if made.path else made.text
            assert "rtn" in text and len(made.damaged) <= 1
    assert broken == []


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x", "a/../../b", "a\\b", "", "..", "C:x", "a\0b"])
def test_an_artifact_lies_beside_its_record(recorded, path):
    values = hashed_json.read(recorded.folder / "record.json") | {"artifacts": {"grid": path}}
    assert f"artifact grid is {path!r}" in schema.problem(values)


def test_a_plugins_metric_that_no_record_holds_has_failed_and_costs_nothing_else(recorded, tmp_path):
    odd = {"value": "high", "n": "many", "passport": [], "better": "up", "status": "ok"}
    nan = recorded.metrics["psnr"] | {"value": float("nan"), "ci95": [float("nan"), 1.0]}
    half = recorded.metrics["psnr"] | {"ci95": [-float("inf"), 1.0], "passport": {"seconds": np.float32(0.5)}}
    recorded.metrics |= {"odd": odd, "nan": nan, "half": half}
    (tmp_path / "again").mkdir()
    write(recorded, tmp_path / "again")
    back = read(tmp_path / "again" / "record.json")
    assert {name: entry["status"] for name, entry in back.metrics.items()} == {
        "psnr": "ok", "odd": "failed", "nan": "failed", "half": "ok",
    }  # fmt: skip
    assert back.status == "ok" and back.metrics["half"]["ci95"] is None
    assert back.metrics["half"]["passport"] == {"seconds": 0.5}
    assert back.non_finite == ["metrics/nan/value: nan", "metrics/nan/ci95/0: nan", "metrics/half/ci95/0: -inf"]
    assert "expected a number" in back.metrics["odd"]["reason"]


def test_a_record_written_today_may_be_copied_and_read_anywhere(recorded, tmp_path):
    shutil.copytree(recorded.folder, tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere" / "record.json").metrics == recorded.metrics
