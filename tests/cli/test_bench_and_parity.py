"""`ditbench bench` and `ditbench parity`: every row is timed or compared for real; what has no real kernel is refused."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch

from ditbench.harness.backends import onednn_int8, vnni
from ditbench.harness.backends.base import choose
from ditbench.harness.backends.matrix import example_recipe
from ditbench.harness.cli import main
from ditbench.harness.cli.parity import Row, worst_psnr_db
from ditbench.harness.measurement.parity import differences
from ditbench.harness.measurement.timing import interleaved

CPU = torch.device("cpu")
needs_real = pytest.mark.skipif(choose(example_recipe("w8a8"), CPU).KIND != "measured", reason="no int8 kernel here")
needs_vnni = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
ONE_BLOCK = ("model=dit-xl-2-256-random", *(f"model.random.{name}={value}" for name, value in {
    "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 1, "out_channels": 1, "num_layers": 1,
    "sample_size": 16, "num_embeds_ada_norm": 10,
}.items()))  # fmt: skip
SMALL = ("model=tiny-dit", "protocol.steps=2", "calibration.n=2", "tracker=none")


@pytest.fixture(scope="module")
def benched(tmp_path_factory) -> tuple[dict, object, str]:
    """(record, its file, what was printed). Of one block, since compiling takes the time."""
    folder = tmp_path_factory.mktemp("benched")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        arguments = ("--formats", "w8a8", "--batches", "1", "2", "--repeats", "2")
        assert main(["bench", *ONE_BLOCK, *SMALL[1:], f"results_dir={folder}", *arguments]) == 0
    (path,) = (folder / "bench").glob("*.json")
    return json.loads(path.read_text()), path, said.getvalue()


@needs_real
def test_every_candidate_is_timed_at_every_batch_against_bf16_in_its_mode(benched):
    record, _, _ = benched
    rows = {(row["format"], row["mode"], row["rows"]): row for row in record["rows"]}
    assert set(rows) == {(f, m, b) for f in ("bf16", "W8A8") for m in ("eager", "compiled") for b in (1, 2)}
    for (label, mode, batch), row in rows.items():
        baseline = rows["bf16", mode, batch]["latency_ms"]["median"]
        assert row["speedup"] == baseline / row["latency_ms"]["median"]
        assert row["baseline"] == f"bf16 {mode}" and 0 < row["error"] < 0.1
        assert row["backend"] == ("torch" if label == "bf16" else choose(example_recipe("w8a8"), CPU).NAME)
    assert rows["W8A8", "eager", 1]["held_bytes"] < rows["bf16", "eager", 1]["held_bytes"]
    assert record["refused"] == {}


@needs_real
def test_its_record_says_which_shapes_were_changed_and_nothing_of_where_it_ran(benched):
    record, _, _ = benched
    assert record["overrides"] == [*ONE_BLOCK, *SMALL[1:]]


@needs_real
def test_a_random_model_that_is_told_by_prompts_is_timed_without_any_unless_its_method_reads_data(ditbench, tmp_path):
    told = [
        "model=qwen-image-random", *(f"model.random.{name}={value}" for name, value in {
            "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": "[8,12,12]",
            "joint_attention_dim": 64, "inputs.hidden_states": "[16,64]", "inputs.encoder_hidden_states": "[8,64]",
            "inputs.img_shapes.as_is": "[[[1,4,4]]]",
        }.items()), "tracker=none", f"results_dir={tmp_path}", "--formats", "w8a8", "--modes", "eager", "--batches", "1", "--repeats", "1",
    ]  # fmt: skip
    done = ditbench("bench", *told, "method=rtn")
    assert done.code == 0 and "W8A8" in done.out, done.err
    refused = ditbench("bench", *told, "method=smoothquant")
    assert refused.code == 2 and "set calibration.prompts" in refused.err


@needs_real
def test_a_benchmark_says_where_the_time_goes_and_what_the_device_can_do(benched):
    record, _, text = benched
    shares = record["shares"]["W8A8"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["integer product"] > 0 and shares["outside the quantized layers"] > 0
    for parts in record["components"].values():
        assert parts["transformer"] > 0
        assert sum(ms for name, ms in parts.items() if name != "total") == pytest.approx(parts["total"])
    assert record["roofline"]["bf16 TFLOP/s"] > 0 and record["roofline"]["copy GB/s"] > 0
    assert record["env"]["device"] in text and "W8A8" in text


@needs_real
def test_a_benchmark_leaves_a_page_with_its_plot(benched):
    _, path, _ = benched
    assert "one denoising step [ms]" in path.with_suffix(".html").read_text()


@needs_real
def test_a_view_of_the_time_that_fails_costs_no_latency(ditbench, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("the profiler saw no time of the step")

    monkeypatch.setattr("ditbench.harness.bench.benchmark.shares", fails)
    outcome = ditbench(
        "bench", *SMALL, f"results_dir={tmp_path}", "--formats", "w8a8", "--modes", "eager", "--repeats", "1"
    )
    record = json.loads(next(tmp_path.glob("bench/*.json")).read_text())
    assert outcome.code == 0 and len(record["rows"]) == 2 and record["shares"] == {} and record["roofline"]
    assert list(record["refused"]) == ["shares"] and "the profiler saw no time" in record["refused"]["shares"]
    assert f"shares did not run: {record['refused']['shares']}" in outcome.out


def test_a_simulated_format_has_no_speed_to_measure(ditbench, tmp_path):
    outcome = ditbench("bench", *SMALL, f"results_dir={tmp_path}", "--formats", "fp8")
    assert outcome.code == 2 and "FP8 is simulated on cpu" in outcome.err
    assert not (tmp_path / "bench").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@needs_real
def test_a_second_opinion_that_needs_cuda_says_so_and_costs_no_row_of_ours(ditbench, tmp_path):
    few = ("--formats", "w8a8", "--modes", "eager", "--repeats", "1", "--others", "gemlite")
    outcome = ditbench("bench", *SMALL, f"results_dir={tmp_path}", *few)
    assert outcome.code == 0 and "gemlite did not run: gemlite runs on CUDA, the device is cpu" in outcome.out
    assert len(json.loads(next(tmp_path.glob("bench/*.json")).read_text())["rows"]) == 2


def test_calls_take_turns_and_warm_up_is_not_counted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved(calls, CPU, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3 and [len(found) for found in times.values()] == [2, 2]


@needs_vnni
def test_every_backend_and_format_agrees_bit_for_bit(ditbench, tmp_path):
    outcome = ditbench("parity", *SMALL, f"results_dir={tmp_path}", "--formats", "w8a8", "w4a4")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("W")]
    assert {(row[0], row[1]) for row in rows} >= {("W8A8", "vnni"), ("W4A4", "vnni"), ("W8A8", "onednn_int8")}
    assert all("identical" in row and row[-1] == "agrees" for row in rows)


@needs_vnni
def test_a_kernel_that_is_off_is_named_and_the_exit_code_says_so(ditbench, tmp_path, monkeypatch):
    real = vnni.VnniKernel.product
    monkeypatch.setattr(vnni.VnniKernel, "product", lambda self, *rest: real(self, *rest) * 1.01)
    outcome = ditbench("parity", *SMALL, f"results_dir={tmp_path}", "--formats", "w8a8")
    (row,) = (line for line in outcome.out.splitlines() if " vnni " in line)
    assert outcome.code == 3 and row.endswith("DIFFERS") and "1.0e-02" in row


@pytest.mark.parametrize(
    ("label", "relative", "psnr_db", "keeps"),
    [
        ("W8A8", 9e-4, 46.0, True),
        ("W8A8", 9e-4, 44.0, False),
        ("W8A8", 2e-3, 90.0, False),
        ("FP8", 9e-4, 44.0, True),
        ("FP8", 9e-4, 34.0, False),
        ("FP8", 2e-3, 90.0, False),
    ],
)
def test_a_kernel_agrees_within_the_limits_of_its_format(label, relative, psnr_db, keeps):
    """Of sums that are whole numbers more is asked than of FP8's, which every kernel rounds its own way."""
    assert Row(label, "any", 30, relative, relative, psnr_db).keeps_limits is keeps


@pytest.mark.parametrize(
    ("backend", "relative", "keeps"), [("vnni", 2e-3, False), ("gemlite", 2e-3, True), ("gemlite", 5e-3, False)]
)
def test_a_backend_whose_results_leave_in_sixteen_bits_has_a_limit_of_its_own(backend, relative, keeps):
    assert Row("W4A16", backend, 30, relative, relative, 50.0).keeps_limits is keeps


@needs_real
def test_parity_without_formats_takes_those_of_the_method(ditbench, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("ditbench.harness.cli.parity.rows_of", lambda config: asked.append(config.bits.label) or [])
    floats = {"FP8", "NVFP4", "MXFP4", "MXFP6", "MXFP8", "FP8_BLOCK", "INT4_G64"}
    for name, more in (("rtn", floats), ("ptq4dit", set())):
        asked.clear()
        outcome = ditbench("parity", *SMALL, f"method={name}", f"results_dir={tmp_path}")
        assert outcome.code == 2 and "no real backend here runs" in outcome.err
        assert set(asked) == {"W8A8", "W6A6", "W4A8", "W4A4", "W3A4", "W8A16", "W4A16"} | more


def test_parity_of_what_nothing_runs_is_refused(ditbench, tmp_path, monkeypatch):
    for backend in (onednn_int8, vnni):
        monkeypatch.setattr(backend, "unsupported", lambda recipe, device: "not here")
    outcome = ditbench("parity", *SMALL, f"results_dir={tmp_path}", "--formats", "w8a8")
    assert outcome.code == 2 and "no real backend here runs w8a8" in outcome.err


def test_differences_are_relative_to_the_simulated_output():
    y, expected = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert differences(y, expected) == pytest.approx((0.5 / 5.0, 0.5 / 4.0))
    assert differences(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


def test_the_worst_image_counts():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    other = images.clone()
    other[1] = 51  # a fifth of the peak: 20 log10(5) dB
    assert worst_psnr_db(images, images) == float("inf")
    assert worst_psnr_db(other, images) == pytest.approx(13.979, abs=1e-3)


@pytest.mark.parametrize(
    ("override", "flag"),
    [("bits=w8a8", "--formats w8a8"), ("bits=w8a8,w4a8", "--formats w8a8 w4a8"), ("measure.repeats=3", "--repeats 3")],
)
def test_a_setting_that_a_benchmark_has_a_flag_for_is_refused_with_the_flag(override, flag, capsys):
    assert main(["bench", "model=tiny-dit", override]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ditbench: {override}: ") and said.rstrip().endswith(f"write {flag}")
