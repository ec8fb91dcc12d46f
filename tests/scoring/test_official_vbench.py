"""Official VBench's side: what it is given, how it is started, what it answers. It itself is not installed here."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from old_samples import save_samples

from ditbench.eval.statistics import WILSON
from ditbench.eval.vbench_totals import NAMES, QUALITY
from ditbench.harness.common.errors import UserError
from ditbench.harness.records.record import Record, add_metric, read, write
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.harness.scoring import official_vbench

FRAMES, FPS = 6, 12.5
# As vbench 0.1.5 writes it; imaging_quality's videos are in percent, its total is not.
RESULTS = {
    "dynamic_degree": [
        0.5,
        [
            {"video_path": "videos/a cat-0.mp4", "video_results": True},
            {"video_path": "videos/a cat-1.mp4", "video_results": False},
        ],
    ],
    "imaging_quality": [
        0.4,
        [
            {"video_path": "videos/a cat-0.mp4", "video_results": 30.0},
            {"video_path": "videos/a cat-1.mp4", "video_results": 50.0},
        ],
    ],
    "object_class": [
        0.25,
        [{"video_path": "a", "video_results": 1.0, "success_frame_count": 4, "frame_count": 4},
         {"video_path": "b", "video_results": 0.0, "success_frame_count": 0, "frame_count": 12}],
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def data(monkeypatch, tmp_path):
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def samples(texts=("a cat", "a dog on the sea", "a cat"), dimensions=()) -> Samples:
    """Noise: what loses anything in writing shows it. The sides are odd, which chroma subsampling would refuse."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(texts), FRAMES, 17, 23, 3), generator=random).to(torch.uint8)
    about = {"dimension": list(dimensions)} if dimensions else {}
    return Samples(pixels, prompts=tuple(Prompt(text, about) for text in texts), fps=FPS)


def run_folder(tmp_path, name="a" * 12, given=None, **fields):
    folder = tmp_path / "results" / "runs" / "videos" / name
    folder.mkdir(parents=True)
    save_samples(given or samples(), folder / "images.npz")
    artifacts = {"images": "images.npz", "animation": "animation.gif"}
    record = Record(name, "ok", {"seed": 3, "metrics": {"resamples": 20}}, "rtn", "tiny-video", "videos")
    record.artifacts, record.metrics = artifacts, {"psnr": {"value": 1.0, "better": "higher", "n": 3, "passport": {}}}
    for field, value in fields.items():
        setattr(record, field, value)
    write(record, folder)
    return folder


def test_videos_are_named_by_prompt_and_index_and_hold_every_frame_to_the_byte(tmp_path):
    av = pytest.importorskip("av")
    given = samples()
    paths = official_vbench.export_videos(given, tmp_path / "videos")
    assert [path.name for path in paths] == ["a cat-0.mp4", "a dog on the sea-0.mp4", "a cat-1.mp4"]
    for path, video_FHWC in zip(paths, given.pixels, strict=True):
        with av.open(path) as container:
            assert float(container.streams.video[0].average_rate) == FPS
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        np.testing.assert_array_equal(np.stack(frames), video_FHWC.numpy())


@pytest.mark.parametrize("text", ["a cat/dog", "a" * 252])
def test_a_prompt_that_cannot_be_a_file_name_is_said(text, tmp_path):
    pytest.importorskip("av")
    with pytest.raises(UserError, match="cannot be one"):
        official_vbench.export_videos(samples((text,)), tmp_path / "videos")


def test_without_pyav_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        official_vbench.export_videos(samples(), tmp_path / "videos")


def test_the_command_is_the_one_that_vbench_evaluate_starts(tmp_path):
    made = official_vbench.command(tmp_path / "python", tmp_path / "v", tmp_path / "o", "scene", "vbench_standard")
    assert made[0] == str(tmp_path / "python") and made[1:3] == ["-m", "torch.distributed.run"]
    assert made[made.index("--nproc_per_node") + 1] == "1"
    rest = made[made.index("vbench.launch.evaluate") + 1 :]
    assert dict(zip(rest[::2], rest[1::2], strict=True)) == {
        "--videos_path": str(tmp_path / "v"), "--output_path": str(tmp_path / "o"), "--dimension": "scene",
        "--mode": "vbench_standard",
    }  # fmt: skip


def test_vbenchs_own_prompts_choose_the_dimensions_and_the_mode():
    own = samples(dimensions=("scene", "object_class", "dynamic_degree"))
    assert official_vbench.usual_dimensions(own) == ["dynamic_degree", "scene"]  # object_class needs detectron2
    assert official_vbench.mode_of(own) == "vbench_standard" and official_vbench.mode_of(samples()) == "custom_input"
    assert official_vbench.usual_dimensions(samples()) == list(official_vbench.OF_ANY_PROMPT)


def test_results_are_read_from_the_official_format(tmp_path):
    path = tmp_path / "results_2025-01-01-00:00:00_eval_results.json"
    path.write_text(json.dumps(RESULTS, indent=4))
    assert official_vbench.parsed(path, "dynamic_degree") == (0.5, [1.0, 0.0])
    assert official_vbench.parsed(path, "imaging_quality") == (0.4, [0.3, 0.5])
    with pytest.raises(official_vbench.VBenchFailed, match="not vbench's results of scene"):
        official_vbench.parsed(path, "scene")
    path.write_text('{"scene": [NaN, [{"video_results": 1}]], "color": [0.0, []]}')
    for name in ("scene", "color"):
        with pytest.raises(official_vbench.VBenchFailed, match="vbench gave"):
            official_vbench.parsed(path, name)


def test_an_interval_is_given_where_the_total_is_the_mean_over_videos_only():
    entry = official_vbench.entry_of("imaging_quality", 0.4, [0.3, 0.5], "custom_input")
    half = 12.7062 * 0.1  # Student's of two videos
    assert entry["ci95"] == pytest.approx([0.4 - half, 0.4 + half], abs=1e-4) and entry["n"] == 2
    assert entry["passport"]["version"] == "vbench 0.1.5" and entry["passport"]["mode"] == "custom_input"
    by_frames = official_vbench.entry_of("object_class", 0.25, [1.0, 0.0], "vbench_standard")
    assert by_frames["ci95"] is None and "not the mean" in by_frames["passport"]["ci_method"]
    flickering = official_vbench.entry_of("temporal_flickering", 0.4, [0.4], "vbench_standard")
    assert "not applied" in flickering["passport"]["static_filter"]


def test_a_share_of_videos_has_wilsons_interval_which_keeps_a_width_at_all_and_none(tmp_path):
    path = tmp_path / "results_eval_results.json"
    videos = [{"video_path": f"{index}.mp4", "video_results": True} for index in range(5)]
    path.write_text(json.dumps({"dynamic_degree": [1.0, videos]}))
    value, per_video = official_vbench.parsed(path, "dynamic_degree")
    entry = official_vbench.entry_of("dynamic_degree", value, per_video, "custom_input")
    assert entry["passport"]["ci_method"] == WILSON
    assert entry["ci95"] == pytest.approx([0.5655, 1.0], abs=1e-4)  # n / (n + z²)


@pytest.fixture
def vbench(monkeypatch, tmp_path):
    """A Python that answers as vbench does, or fails as it does for `scene`; what it was started with."""
    pytest.importorskip("av")
    started = []

    def run(command, env=None, **_):
        value = dict(zip(command, command[1:], strict=False))
        names = sorted(path.name for path in Path(value["--videos_path"]).iterdir())
        started.append((value["--dimension"], value["--mode"], names, env))
        if value["--dimension"] == "scene":
            said = "Traceback (most recent call last):\n  line 1\nKeyError: 'no weights'\nTraceback (…):\n  y\nChildFailedError"
            return SimpleNamespace(returncode=1, stderr=said)
        out = Path(value["--output_path"])
        out.mkdir()
        answer = {value["--dimension"]: RESULTS.get(value["--dimension"], RESULTS["dynamic_degree"])}
        (out / "results_1_eval_results.json").write_text(json.dumps(answer))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(official_vbench.subprocess, "run", run)
    monkeypatch.setattr(official_vbench, "side_python", lambda: tmp_path / "python")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return started


def test_scores_stand_beside_the_record_which_stays_as_it_was(vbench, tmp_path, data):
    folder = run_folder(tmp_path)
    before = (folder / "record.json").read_bytes()
    outcome = official_vbench.score(str(folder), ["dynamic_degree", "imaging_quality"], tmp_path / "results")
    assert not outcome.failed and "vbench/imaging_quality: 0.4000 (n = 2)" in outcome.text
    assert (folder / "record.json").read_bytes() == before
    metrics = read(folder / "record.json").metrics
    assert set(metrics) == {"psnr", "vbench/dynamic_degree", "vbench/imaging_quality"}
    assert metrics["vbench/imaging_quality"]["value"] == 0.4
    dimension, mode, names, env = vbench[0]
    assert (dimension, mode) == ("dynamic_degree", "custom_input") and "a cat-1.mp4" in names
    assert env["VBENCH_CACHE_DIR"].endswith("vbench") and "PYTHONPATH" not in env


def test_what_is_scored_already_is_not_scored_again(vbench, tmp_path):
    folder = run_folder(tmp_path)
    official_vbench.score(str(folder), ["dynamic_degree"], tmp_path / "results")
    again = official_vbench.score("videos", ["dynamic_degree"], tmp_path / "results")
    assert "scored already" in again.text and len(vbench) == 1
    with pytest.raises(UserError, match="nothing is overwritten"):
        add_metric(folder, "vbench/dynamic_degree", {})
    with pytest.raises(UserError, match="nothing is overwritten"):
        add_metric(folder, "psnr", {})


def test_a_dimension_that_fails_says_why_and_keeps_the_others(vbench, tmp_path):
    folder = run_folder(tmp_path, given=samples(dimensions=("scene", "dynamic_degree", "object_class")))
    outcome = official_vbench.score(str(folder), None, tmp_path / "results")
    assert outcome.failed and "vbench/scene: FAILED: KeyError: 'no weights'" in outcome.text
    assert set(read(folder / "record.json").metrics) == {"psnr", "vbench/dynamic_degree", *NAMES}
    assert {mode for _, mode, _, _ in vbench} == {"vbench_standard"}


def test_totals_are_filed_from_what_a_run_has_and_again_when_it_has_more(vbench, tmp_path, monkeypatch):
    of_quality = [name for name in official_vbench.DIMENSIONS if name in QUALITY]
    folder = run_folder(tmp_path, given=samples(dimensions=official_vbench.DIMENSIONS))
    first = official_vbench.score(str(folder), of_quality[:-1], tmp_path / "results")
    assert (
        f"vbench/quality_score: skipped: of VBench's dimensions, on VBench's own prompts, these are missing: {of_quality[-1]};"
        in first.text
    )
    assert read(folder / "record.json").metrics["vbench/quality_score"]["status"] == "skipped"
    official_vbench.score(str(folder), of_quality[-1:], tmp_path / "results")
    metrics = read(folder / "record.json").metrics
    values = {name: metrics[f"vbench/{name}"]["value"] for name in QUALITY}
    parts = [weight * (values[name] - low) / (high - low) for name, (low, high, weight) in QUALITY.items()]
    assert metrics["vbench/quality_score"]["value"] == pytest.approx(sum(parts) / 6.5)
    assert (
        metrics["vbench/total_score"]["status"] == "skipped"
        and "object_class" in metrics["vbench/total_score"]["reason"]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    again = official_vbench.score(str(folder), of_quality, tmp_path / "results")
    assert "scored already" in again.text and "vbench/quality_score: " in again.text, "totals alone need no device"


def test_the_report_holds_scores_that_were_filed_later(tmp_path):
    from ditbench.harness.report import report

    folder = run_folder(tmp_path)
    add_metric(folder, "vbench/scene", official_vbench.entry_of("scene", 0.625, [0.5, 0.75], "vbench_standard"))
    text = report(tmp_path / "results", "videos", "csv").text
    assert "vbench/scene" in text.splitlines()[0] and "0.625" in text


@pytest.mark.parametrize("damage", ["{", '{"value": 1.0}', "[]"])
def test_a_filed_metric_that_cannot_be_read_is_named_and_costs_the_record_nothing_else(tmp_path, damage):
    folder = run_folder(tmp_path)
    path = add_metric(folder, "vbench/scene", official_vbench.entry_of("scene", 0.6, [0.5, 0.7], "custom_input"))
    path.write_text(damage)
    record = read(folder / "record.json")
    (line,) = record.damaged
    assert f"{path}: not a readable metric" in line and set(record.metrics) == {"psnr"}


@pytest.mark.parametrize("name", ["../psnr", "vbench/../../x", "/etc/x", "a\\b"])
def test_a_metric_cannot_be_filed_outside_of_its_record(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file"):
        add_metric(run_folder(tmp_path), name, {})


@pytest.mark.parametrize(
    ("target", "dimensions", "said"),
    [
        ("vidoes", None, "expected a run's folder"),
        ("videos", ["scenes"], "did you mean 'scene'"),
        ("videos", None, "CUDA"),
    ],
)
def test_what_cannot_be_scored_is_one_plain_line(target, dimensions, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_folder(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        official_vbench.score(target, dimensions, tmp_path / "results")
    assert "\n" not in str(error.value)


def test_a_run_of_images_has_no_videos_to_score(tmp_path):
    run_folder(tmp_path, artifacts={"images": "images.npz"})
    with pytest.raises(UserError, match="no finished run with videos"):
        official_vbench.video_runs("videos", tmp_path / "results")


@pytest.fixture
def online(monkeypatch):
    """Downloads are allowed, and this Python is the one that is wanted."""
    monkeypatch.setenv("DITBENCH_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(official_vbench, "PYTHON", f"{sys.version_info[0]}.{sys.version_info[1]}")


def test_without_a_network_the_environment_fails_in_one_plain_line_and_is_not_taken_for_whole(
    online, monkeypatch, data
):
    said = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/absl-py/
ERROR: Could not find a version that satisfies the requirement absl-py==2.5.1 (from versions: none)
ERROR: No matching distribution found for absl-py==2.5.1
"""
    answers = {"venv": ("", 0), "pip": (said, 1)}
    monkeypatch.setattr(
        official_vbench.subprocess,
        "run",
        lambda step, **_: SimpleNamespace(stderr=answers[step[2]][0], returncode=answers[step[2]][1]),
    )
    with pytest.raises(UserError, match="No matching distribution found for absl-py==2.5.1; it needs PyPI") as error:
        official_vbench.side_python()
    assert "\n" not in str(error.value) and not list(data.rglob("whole"))


def test_an_environment_that_is_whole_is_taken_as_it_is(online, monkeypatch):
    made = []

    def run(step, **_):
        made.append(step)
        if step[2] == "venv":
            Path(step[3]).mkdir(parents=True)
        return subprocess.CompletedProcess(step, 0, "", "")

    monkeypatch.setattr(official_vbench.subprocess, "run", run)
    first = official_vbench.side_python()
    assert [step[1:3] for step in made] == [["-m", "venv"], ["-m", "pip"]]
    assert made[1][-1] == str(official_vbench.REQUIREMENTS)
    pinned = official_vbench.REQUIREMENTS.read_text().splitlines()
    assert f"vbench=={official_vbench.VBENCH}" in pinned and "transformers==4.33.2" in pinned
    assert all("==" in line for line in pinned[1:])
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    assert official_vbench.side_python() == first and len(made) == 2


def test_offline_and_without_its_python_it_says_so(online, monkeypatch):
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    with pytest.raises(UserError, match="switched off"):
        official_vbench.side_python()
    monkeypatch.setattr(official_vbench, "PYTHON", "3.2")
    with pytest.raises(UserError, match="python3.2 on the PATH"):
        official_vbench.side_python()
