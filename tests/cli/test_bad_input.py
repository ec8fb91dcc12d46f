"""Every bad input: one or two lines that say where, what was expected, what came, what to do; no traceback."""

from __future__ import annotations

import pytest
import torch
from outcomes import FAILED, REFUSED, assert_short, process, records, statuses

from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError

# (arguments of `ditbench run`, what the message must say): all found before anything runs.
REFUSALS = [
    ("metohd=rtn", "no setting 'metohd'", "did you mean method?"),
    ("method=smoothqant", "no method 'smoothqant'", "did you mean 'smoothquant'?", "quarot"),
    ("model=tiny_dit", "no model 'tiny_dit'", "did you mean 'tiny-dit'?"),
    ("bits=w9a4", "bits=w9a4", "weights cannot have 9 bits", "2 to 8, or 16"),
    ("bits=w4a1", "activations cannot have 1 bits"),
    ("bits=int8", "'int8'", "w<bits>a<bits>", "w8a8", "fp8"),
    ("bits=fp8 bits.weight.symmetric=false", "e4m3 has 8 bits and no zero point", "bits=w8a8"),
    ("bits=w8a8 bits.act.number=e5m1", "number 'e5m1' is none of int, e4m3"),
    ("bits=w8a8 bits.act.number=e5m2", "e5m2 with scale float32", "goes with granularity per_block"),
    ("bits=fp8 method=ptq4dit", "ptq4dit is about integer codes, and bits=fp8 has none"),
    ("bits=mxfp8 method=q_diffusion", "q_diffusion is about integer codes, and bits=mxfp8 has none"),
    ("bits=int4_g64 method=lrq_dit", "lrq_dit is about integer codes, and bits=int4_g64 has scales per block"),
    ("bits=nvfp4 method=q_dit", "q_dit chooses the size of its groups, and bits=nvfp4 has blocks of 16"),
    ("bits=mxfp8 bits.act.dynamic=false", "activations in blocks (mxfp8) are dynamic"),
    ("bits=nvfp4 bits.weight.rule=floor", "rule 'floor' of scale e4m3 is none of divide, reciprocal"),
    (
        "bits=nvfp4 protocol.attention=true",
        "protocol.attention=true quantizes q, k, v",
        "bits=nvfp4 has activations in blocks; set protocol.attention to int8, int8_all, fp8, nvfp4",
    ),
    ("bits=wnvfp5_a8", "weights cannot be 'nvfp5'", "nvfp4"),
    ("protocol=ptq4dt", "no protocol 'ptq4dt'", "did you mean 'ptq4dit'?"),
    ("experiment=dmeo", "no experiment 'dmeo'", "did you mean 'demo'?"),
    ("experiment=null", "no experiment 'null'", "known: ", "demo"),
    ("~tracker", "~tracker: nothing can be left out"),
    ("metrics.names=null", "metrics.names must be a list, got None; write metrics.names=[]"),
    ("tracker=wandbb", "no tracker 'wandbb'", "did you mean 'wandb'?"),
    ("method=smoothquant method.strenght=0.5", "setting of method 'strenght'", "did you mean method.strength?"),
    ("bits.weight.symetric=true", "bits.weight 'symetric'", "did you mean bits.weight.symmetric?"),
    ("method=smoothquant +method.alpha=0.5", "parameter of method smoothquant 'alpha'", "known: floor, strength"),
    ("method=smoothquant method.strength=2", "strength must be in [0, 1], got 2"),
    ("method=smoothquant method.strength=high", "method smoothquant: method.strength must be a number, got 'high'"),
    ("method=vidit_q method.scale=off", "method.scale must be true or false, got 'off'"),
    ("method=gptq method.block=1.5", "method.block must be a whole number, got 1.5"),
    ("method=duquant method.seed=abc", "method.seed must be a whole number, got 'abc'"),
    ("method=htg method.groups=few", "method.groups must be a whole number, got 'few'"),
    ("method=clq method.probe=0.4", "method.probe must be a list of numbers, got 0.4"),
    ("method=clq method.probe=[a]", "method.probe must be a list of numbers, got ['a']"),
    ("method=quarot method.clip=nan", "method.clip must be finite, got nan"),
    ("w4a8", "'w4a8' is not an override", "name=value"),
    ("bits=w4a8=w8a8[", "is not an override", "name=value"),
    ("method=rtn,quarot", "method=rtn,quarot", "add -m to sweep"),
    ("protocol.n=0", "protocol.n must be a whole number, at least 1; got 0"),
    ("protocol.n=many", "protocol.n must be a whole number", "got 'many'"),
    ("protocol.steps=0", "protocol.steps must be a whole number, at least 1; got 0"),
    ("calibration.n=-1", "calibration.n must be a whole number, at least 0; got -1"),
    ("generate.batch_size=0", "generate.batch_size must be a whole number, at least 1 (or auto); got 0"),
    ("calibration.batch_size=big", "calibration.batch_size must be a whole number, at least 1 (or auto); got 'big'"),
    ("memory=swap", "no memory 'swap'; known: auto, offload, resident"),
    ("metrics.resamples=0", "metrics.resamples must be a whole number, at least 2; got 0"),
    ("metrics.resamples=1", "metrics.resamples must be a whole number, at least 2; got 1"),
    ("measure.repeats=0", "measure.repeats must be a whole number, at least 1; got 0"),
    ("generate.noise_floor_seeds=-1", "generate.noise_floor_seeds", "at least 0; got -1"),
    ("seed=one", "seed must be a whole number", "got 'one'"),
    ("protocol.guidance=much", "protocol.guidance must be a number", "got 'much'"),
    ("protocol.guidance=inf", "protocol.guidance must be finite, got inf"),
    (
        "protocol.attention=maybe",
        "protocol.attention must be true, false or one of int8, int8_all, fp8, nvfp4, got 'maybe'",
    ),
    ("protocol.attention=8", "protocol.attention must be true, false or one of int8", "got 8"),
    (
        "method=external method.path=. protocol.attention=int8",
        "method=external runs as somebody else quantized it",
        "set protocol.attention=false",
    ),
    (
        "bits=mixed bits.budget.latency_ms=1 protocol.attention=fp8",
        "bits.budget.latency_ms: protocol.attention=fp8 is simulated",
        "take another budget",
    ),
    ("bits.act.dynamic=no", "bits.act.dynamic must be true or false, got 'no'"),
    ("protocol.sampler=euler", "protocol.sampler 'euler'", "known: ddim, ddpm"),
    ("protocol=mlperf_sdxl", "no protocol.sampler 'pipeline'", "protocol mlperf_sdxl asks for it", "of family dit"),
    ("protocol.scope=everything", "protocol.scope 'everything'", "known: all, blocks"),
    ("protocol.labels=mixed", "protocol.labels 'mixed'", "known: balanced, random"),
    ("protocol.skip=['(']", "protocol.skip", "'('", "regular expression"),
    ("generate.dtype=half", "generate.dtype 'half'", "float16"),
    ("metrics.names=[psnrr]", "no metric 'psnrr'", "did you mean 'psnr'?"),
    ("metrics.names=[mlperf/vbench_score]", "no metric 'mlperf/vbench_score'", "come from `ditbench vbench`"),
    ("metrics.names=psnr", "metrics.names must be a list", "metrics.names=[psnr]"),
    ("metrics=fid", "no metrics 'fid'", "known: fidelity, inception, judge"),
    ("backend=onednn", "no backend 'onednn'", "did you mean 'onednn_int8'?"),
    ("device=gpu", "device='gpu'", "known here: auto, cpu"),
    ("bits.weight.granularity=per_row", "'per_row'", "per_channel"),
    ("bits.weight.granularity=per_group", "group_size goes with granularity per_group", "group_size None"),
    ("bits.weight.bits=four", "bits.weight.bits must be a whole number, got 'four'"),
    ("bits.weight.bits=4.0", "bits.weight.bits must be a whole number, got 4.0"),
    ("bits.act.granularity=per_group bits.act.group_size=-8", "bits.act.group_size must be at least 1, got -8"),
    ("name=123", "name must be text, got 123", "name='123'"),
    ("device=3", "device must be text, got 3"),
    ("metrics.reference=5", "metrics.reference must be text or null, got 5"),
    ("name=../elsewhere", "name='../elsewhere'", "must not"),
    ("results_dir=", "results_dir is empty", "results_dir=./results"),
    ("model.family=unet", "no model family 'unet'", "known: chroma, cogvideox, dit, flux"),
    ("model.source=123", "model.source must be text or null, got 123"),
    ("model.source=null", "model.source is null", "model.random"),
    ("model.seed=abc", "model.seed must be a whole number, got 'abc'"),
    ("model.source=/nowhere/at/all", "/nowhere/at/all", "model.source"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), [(case[0], case[1:]) for case in REFUSALS], ids=lambda case: str(case)[:40]
)
def test_a_wrong_choice_or_value_is_refused_before_anything_runs(run, tmp_path, arguments, words):
    outcome = run(*arguments.split())
    assert outcome.code == REFUSED
    assert_short(outcome, *words)
    assert not list(tmp_path.glob("runs/*/*")), "something was recorded"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("method=rtn,smoothqant", "did you mean 'smoothquant'?"),
        ("bits=w8a8,w9a4", "weights cannot have 9 bits"),
        ("model=tiny-dit,tiny-dot", "did you mean 'tiny-dit'?"),
        ("method=rtn,smoothquant method.strength=0.6", "no setting of method 'strength'; method=rtn has form, name"),
    ],
)
def test_in_a_sweep_a_wrong_name_is_found_before_the_first_run(run, tmp_path, arguments, word):
    outcome = run("-m", *arguments.split())
    assert outcome.code == REFUSED
    assert_short(outcome, word)
    assert not (tmp_path / "runs").exists()


def test_in_a_sweep_a_refused_value_does_not_cost_the_other_runs(run, tmp_path):
    outcome = run("-m", "method=smoothquant", "method.strength=2,0.5")
    assert outcome.code == REFUSED
    assert "strength must be in [0, 1], got 2" in outcome.error_lines[-1]
    assert statuses(tmp_path) == ["ok"]
    assert "smoothquant" in outcome.out, "the finished run is missing from the table"


# What only the model can tell fails inside the run: recorded as failed, exit code 3, and a sweep goes on.
FAILURES = [
    (
        "bits.weight.granularity=per_group bits.weight.group_size=40",
        "transformer_blocks.0.attn1.to_q: group_size 40 does not divide C=96",
        "try 16, 24, 32, 48, 96",
    ),
    ("bits=w4a4 backend=onednn_int8", "backend=onednn_int8 cannot run this", "W4A4", "use backend=auto"),
    ("protocol.skip=['.*']", "model tiny-dit", "protocol.skip leave no layer to quantize"),
]


@pytest.mark.parametrize(("arguments", "words"), [(case[0], case[1:]) for case in FAILURES])
def test_what_only_the_model_can_tell_is_recorded_as_a_failed_run(run, tmp_path, arguments, words):
    outcome = run(*arguments.split())
    assert outcome.code == FAILED
    assert "Traceback" not in outcome.err
    last = outcome.error_lines[-1]
    assert last.startswith("failed: tiny-dit rtn ")
    for word in words:
        assert word in last
    assert statuses(tmp_path) == ["failed"]
    assert all(word in records(tmp_path)[0]["error"] for word in words)


def test_debug_shows_the_traceback_of_a_failed_run(run):
    arguments = ("bits.weight.granularity=per_group", "bits.weight.group_size=40")
    assert "Traceback" not in run(*arguments).err
    assert "in check_width" in run(*arguments, "--debug").err


@pytest.mark.parametrize("flag", ["--debug", "debug=true"])
def test_debug_lets_a_refusal_through_with_its_traceback(flag):
    with pytest.raises(UserError) as raised:
        main(["run", "bits=w9a4", flag])
    assert any(entry.name == "parse_label" for entry in raised.traceback)


def test_the_process_itself_ends_with_one_line_or_with_debug_in_a_traceback(tmp_path):
    short = process("report", "--results-dir", str(tmp_path))
    assert short.code == REFUSED and short.out == ""
    assert short.err.count("\n") == 1 and "no record to report" in short.err
    long = process("report", "--results-dir", str(tmp_path), "--debug")
    assert long.code != 0 and "Traceback" in long.err and "UserError" in long.err


def test_a_hub_model_without_a_network_says_what_to_download_and_where_to_put_it(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    outcome = ditbench("run", "model=dit-xl-2-256", "tracker=none", f"results_dir={tmp_path}")
    assert outcome.code == REFUSED
    assert "Traceback" not in outcome.err
    assert "facebook/DiT-XL-2-256 is no folder here" in outcome.err
    assert "hf download facebook/DiT-XL-2-256 --local-dir ./weights/DiT-XL-2-256" in outcome.err
    assert "model.source=./weights/DiT-XL-2-256" in outcome.err


def test_cuda_on_a_machine_without_it_is_refused(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("device=cuda")
    assert outcome.code == REFUSED
    assert_short(outcome, "device='cuda' cannot be used here", "known here: auto, cpu")


def test_an_unknown_command_is_answered_with_the_known_ones(ditbench):
    outcome = ditbench("reprot")
    assert outcome.code == REFUSED
    assert_short(outcome, "no command 'reprot'", "did you mean 'report'?", "check-method")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("report --format pdf", ("invalid choice: 'pdf'", "latex")),
        ("report --experiment none", ("no experiment", "'none'", "default")),
        ("list method", ("invalid choice: 'method'", "'methods'")),
        ("check-method smoothqant", ("no method 'smoothqant'", "did you mean 'smoothquant'?")),
        ("zoo train tiny", ("invalid choice: 'tiny'", "'tiny-dit'")),
        ("run --fource", ("unrecognized arguments: --fource",)),
    ],
)
def test_a_wrong_argument_of_any_command_is_named_with_what_would_do(
    ditbench, finished, tmp_path, monkeypatch, arguments, words
):
    (tmp_path / "results").mkdir()
    (tmp_path / "runs").rename(tmp_path / "results" / "runs")
    monkeypatch.chdir(tmp_path)
    outcome = ditbench(*arguments.split())
    assert outcome.code == REFUSED
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.error_lines[-1]
