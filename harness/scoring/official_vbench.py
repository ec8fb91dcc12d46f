"""Official VBench (Huang et al. 2023, arXiv:2311.17982) on recorded videos: its own code, in an environment of its own.

`ditbench vbench RUN_FOLDER|EXPERIMENT`
    1. makes, once, a virtual environment with the old packages that PyPI's vbench needs (transformers 4.33.2, numpy < 2);
    2. writes a run's videos as `<prompt>-<index>.mp4`, the names vbench looks for: H.264 in RGB, without loss;
    3. runs vbench there, a dimension at a time (`vbench evaluate` itself would lose the exit code of what it starts);
    4. files each score beside the record (`harness.records.record.add_metric`) as `vbench/<dimension>`, and VBench's totals of all
       that the record has by then (eval/vbench_totals.py).

Of VBench's own prompts (they carry `dimension`) each dimension takes those that list it; other prompts are judged in
vbench's mode `custom_input`. What it does not do: VBench's static filter before temporal_flickering.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ditbench.eval.batches import one_by_one
from ditbench.eval.passport import passport
from ditbench.eval.statistics import OF_ONE, STUDENT, WILSON, Interval, mean_with_ci, share_with_ci
from ditbench.eval.vbench_totals import STANDARD, totals
from ditbench.eval.weights import data_folder, offline, weights_folder
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.files import file_sha256
from ditbench.harness.records.attempts import named
from ditbench.harness.records.record import Record, add_metric, read
from ditbench.harness.samples.samples import Samples
from ditbench.harness.scoring import mlperf

VBENCH = "0.1.5"
REQUIREMENTS = Path(__file__).with_name("vbench_requirements.txt")
PYTHON = "3.11"  # the newest that tokenizers 0.13 has wheels for

OF_ANY_PROMPT = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree")
OF_ANY_PROMPT += ("aesthetic_quality", "imaging_quality")
OF_ITS_PROMPTS = ("temporal_flickering", "overall_consistency", "temporal_style", "human_action", "scene")
OF_ITS_PROMPTS += ("appearance_style",)
NEED_DETECTRON2 = ("object_class", "multiple_objects", "color", "spatial_relationship")
DIMENSIONS = (*OF_ANY_PROMPT, *OF_ITS_PROMPTS, *NEED_DETECTRON2)
PERCENT = ("imaging_quality",)  # whose scores per video are 100 times the total's


@dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool


def score(target: str, dimensions: Sequence[str] | None, results_dir: Path) -> Outcome:
    """Every asked dimension of one run or of an experiment's, and the totals; None: the dimensions that its prompts are for.

    Raises:
        UserError: no such run, no videos, an unknown dimension; no CUDA device or no environment, where a dimension has to be scored.
    """
    import torch

    from ditbench.harness.records.drawn_samples import samples_of

    for name in dimensions or ():
        if name not in DIMENSIONS:
            raise unknown_name("dimension of vbench", name, DIMENSIONS)
    todo = []
    for record in video_runs(target, results_dir):
        samples = samples_of(record)
        asked = dimensions or usual_dimensions(samples)
        todo.append((record, samples, asked, [name for name in asked if f"vbench/{name}" not in record.metrics]))
    python = None
    if any(lacking for _, _, _, lacking in todo):
        if not torch.cuda.is_available():
            raise UserError("vbench runs on CUDA devices only, and there is none here")
        python = side_python()
    lines, failed = [], False
    for record, samples, asked, lacking in todo:
        assert record.folder is not None, "it was read from a folder"
        at = record.folder.name
        lines += [f"{at} vbench/{name}: scored already" for name in asked if name not in lacking]
        if lacking and python is not None:
            said, one_failed = score_dimensions(python, record, samples, lacking)
            lines += said
            failed |= one_failed
        for name, entry in file_totals(record.folder).items():
            found = f"skipped: {entry['reason']}" if entry["value"] is None else f"{entry['value']:.4f}"
            lines.append(f"{at} {name}: {found}")
    return Outcome("\n".join(lines), failed)


def score_dimensions(
    python: Path, record: Record, samples: Samples, dimensions: Sequence[str]
) -> tuple[list[str], bool]:
    """Score and file them, one after the other: a line for each, and whether one failed."""
    assert record.folder is not None, "it was read from a folder"
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        videos = Path(scratch) / "videos"
        export_videos(samples, videos)
        for name in dimensions:
            try:
                entry = run_dimension(python, videos, name, samples, record)
                add_metric(record.folder, f"vbench/{name}", entry)
                lines.append(f"{record.folder.name} vbench/{name}: {entry['value']:.4f} (n = {entry['n']})")
            except VBenchFailed as error:
                failed = True
                lines.append(f"{record.folder.name} vbench/{name}: FAILED: {error}")
    return lines, failed


def file_totals(folder: Path) -> dict[str, dict[str, Any]]:
    """VBench's totals of what the run has by now, and MLPerf's score under its protocol, filed in the place of those of before."""
    record = read(folder / "record.json")
    found = totals(record.metrics) | mlperf.scores_of(record)
    for name, entry in found.items():
        add_metric(folder, name, entry, again=True)
    return found


class VBenchFailed(Exception):
    """vbench ended without a score; the message is its last line."""


def video_runs(target: str, results_dir: Path) -> list[Record]:
    """The run of a folder, or the finished runs of an experiment, as far as they are videos with prompts."""
    videos = [record for record in named(target, results_dir) if "animation" in record.artifacts]
    if not videos:
        raise UserError(f"{target}: no finished run with videos; run a text-to-video model first")
    return videos


def usual_dimensions(samples: Samples) -> list[str]:
    """Those of VBench that its prompts are for and that need no detectron2 (it has no wheel); else those of any prompt."""
    if mode_of(samples) == "custom_input":
        return list(OF_ANY_PROMPT)
    listed = {name for prompt in samples.prompts for name in prompt.about["dimension"]}
    return [name for name in DIMENSIONS if name in listed and name not in NEED_DETECTRON2]


def mode_of(samples: Samples) -> str:
    """vbench's name for where the prompts are from: its own suite (then each says its dimensions), or elsewhere."""
    return STANDARD if all(prompt.about.get("dimension") for prompt in samples.prompts) else "custom_input"


def export_videos(samples: Samples, folder: Path) -> list[Path]:
    """`<prompt>-<index>.mp4` for every video, index counting the videos of one prompt; decoded they are the same bytes.

    Raises:
        UserError: no PyAV, no prompts, or a prompt that cannot be a file's name.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("writing .mp4 needs PyAV, which comes with ditbench: pip install av") from error

    if not samples.prompts:
        raise UserError("vbench takes videos by their prompts; these were made without")
    folder.mkdir(parents=True)
    paths, index_of = [], Counter[str]()
    for video_FHWC, prompt in zip(one_by_one(samples.videos_NFHWC), samples.prompts, strict=True):
        name = f"{prompt.text}-{index_of[prompt.text]}.mp4"
        index_of[prompt.text] += 1
        if set(name) & {"/", "\0"} or len(name.encode()) > 255:
            raise UserError(f"vbench takes the prompt as the file's name, and {prompt.text[:60]!r} cannot be one")
        with av.open(folder / name, "w") as container:
            stream = container.add_stream("libx264rgb", rate=Fraction(samples.fps).limit_denominator(1000))
            stream.height, stream.width = video_FHWC.shape[1:3]
            stream.pix_fmt, stream.options = "rgb24", {"qp": "0"}
            for frame_HWC in video_FHWC.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
            container.mux(stream.encode())
        paths.append(folder / name)
    return paths


def side_python() -> Path:
    """The Python of vbench's environment, which is made at the first call (about 6 GB).

    Raises:
        UserError: no Python of that version, or pip could not install.
    """
    home = data_folder() / "side_env" / f"vbench-{VBENCH}-{file_sha256(REQUIREMENTS)[:8]}"
    python, whole = home / "bin" / "python", home / "whole"
    if whole.is_file():
        return python
    base = sys.executable if sys.version.startswith(f"{PYTHON}.") else shutil.which(f"python{PYTHON}")
    if base is None:
        raise UserError(f"vbench's packages need Python {PYTHON}; put python{PYTHON} on the PATH")
    if offline():
        raise UserError(f"vbench's environment is not in {home} yet, and downloads are switched off (DITBENCH_OFFLINE)")
    print(f"making vbench's environment in {home} (once, about 6 GB)", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    for step in ([base, "-m", "venv", str(home)], [*pip, "--no-deps", "--requirement", str(REQUIREMENTS)]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"vbench's environment could not be made: {last_line(done.stderr)}; it needs PyPI once, try again there"
            )
    whole.touch()
    return python


def command(python: Path, videos: Path, out: Path, dimension: str, mode: str) -> list[str]:
    """What `vbench evaluate` starts on one GPU."""
    launch = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    launch += ["-m", "vbench.launch.evaluate", "--videos_path", str(videos), "--output_path", str(out)]
    return [*launch, "--dimension", dimension, "--mode", mode]


def run_dimension(python: Path, videos: Path, dimension: str, samples: Samples, record: Record) -> dict[str, Any]:
    """One dimension of one run → its entry of a record's metrics."""
    mode = mode_of(samples)
    out = videos.with_name(f"out-{dimension}")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = inherited | {"VBENCH_CACHE_DIR": str(weights_folder() / "vbench")}
    done = subprocess.run(
        command(python, videos, out, dimension, mode), capture_output=True, text=True, env=environment
    )
    results = sorted(out.glob("*_eval_results.json"))
    if done.returncode or not results:
        raise VBenchFailed(error_line(done.stderr))
    value, per_video = parsed(results[-1], dimension)
    return entry_of(dimension, value, per_video, mode)


def parsed(path: Path, dimension: str) -> tuple[float, list[float] | list[bool]]:
    """vbench's results file: {dimension: [score, [{video_path, video_results, …}, …]]} → the score, and one per video.

    Those of dynamic_degree and human_action are yes or no, and stay bool.
    """
    try:
        value, videos = json.loads(path.read_text(encoding="utf-8"))[dimension]
        found = [video["video_results"] for video in videos]
        scale = 100.0 if dimension in PERCENT else 1.0
        yes_no = all(isinstance(each, bool) for each in found)
        per_video = found if yes_no else [float(each) / scale for each in found]
    except (ValueError, KeyError, TypeError) as error:
        raise VBenchFailed(f"{path.name}: not vbench's results of {dimension} ({error})") from error
    if not math.isfinite(value) or not per_video:
        raise VBenchFailed(f"vbench gave {value} for {dimension} over {len(per_video)} videos")
    return float(value), per_video


def entry_of(dimension: str, value: float, per_video: list[float] | list[bool], mode: str) -> dict[str, Any]:
    """The interval is that of the mean or share over videos, and absent where vbench's total is neither."""
    ci95: Interval | None
    if isinstance(per_video[0], bool):
        (mean, ci95), method = share_with_ci(sum(per_video), len(per_video)), WILSON
    else:
        mean, ci95 = mean_with_ci(np.array(per_video))
        method = STUDENT if ci95 else OF_ONE
    is_mean = math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-6)
    settings = {
        "mode": mode,
        "videos": "mp4, H.264 in RGB, lossless",
        "ci_method": method if is_mean else "none: the total is not the mean over videos",
        "environment_sha256": file_sha256(REQUIREMENTS),
    }
    if dimension == "temporal_flickering":
        settings["static_filter"] = "not applied; VBench first drops videos that move"
    card = passport(f"vbench {dimension}", "ditbench", reference=None, dtype="vbench's own", **settings)
    return {
        "value": value,
        "ci95": list(ci95) if is_mean and ci95 else None,
        "n": len(per_video),
        "status": "ok",
        "reason": None,
        "passport": card | {"version": f"vbench {VBENCH}"},
        "better": "higher",
        "paired": False,
        "unit": "",
        "noise_floor": None,
    }


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def error_line(text: str) -> str:
    """The exception of the first traceback: what follows it is the launcher's."""
    lines, in_traceback = text.splitlines(), False
    for line in lines:
        if line.startswith("Traceback"):
            in_traceback = True
        elif in_traceback and line and not line.startswith(" "):
            return line.strip()[:300]
    return last_line(text)
