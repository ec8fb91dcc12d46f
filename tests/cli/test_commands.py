"""What a newcomer sees: help, lists, the doctor, reports, and a configuration printed without a run."""

from __future__ import annotations

import csv
import io
import re
import shutil

import pytest
import yaml

from ditbench.harness.backends.base import MachineLacks
from ditbench.harness.cli import list as listing
from ditbench.harness.records import hashed_json

COMMANDS = (
    *("run", "status", "retry", "report", "compare", "export", "list", "paper", "reproduce", "parity", "bench"),
    *("check-method", "data", "vbench", "wandb", "doctor", "zoo"),
)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command_and_fits_a_terminal(ditbench, arguments):
    outcome = ditbench(*arguments)
    assert outcome.code == 0 and outcome.err == ""
    for command in COMMANDS:
        assert f"ditbench {command}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    assert len(outcome.out.splitlines()) <= 30


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_run_help_tells_how_to_override_sweep_repeat_and_where_results_go(ditbench, flag):
    outcome = ditbench("run", flag)
    assert outcome.code == 0 and outcome.err == "" and max(map(len, outcome.out.splitlines())) <= 120
    for needed in ("NAME=VALUE", "run -m", "--force", "--cfg job", "./results", "results_dir=", "experiment=demo"):
        assert needed in outcome.out


def test_run_help_shows_every_group_with_its_choices_and_every_setting_with_its_default(ditbench):
    said = ditbench("run", "--help").out
    for group, default, choice in (
        ("model", "tiny-dit", "flux.1-dev"),
        ("method", "rtn", "svdquant"),
        ("bits", "w8a8", "w2a2"),
        ("metrics", "judge", "inception"),
        ("experiment", "–", "demo"),
        ("tracker", "wandb", "trackio"),
    ):
        assert re.search(rf"^  {group} +{default} ", said, re.MULTILINE) and choice in said
    for setting in ("seed=0", "protocol.steps=20", "bits.weight.group_size=null", "measure.repeats=20"):
        assert setting in said
    assert "method.strength=0.5" in ditbench("run", "method=smoothquant", "--help").out


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_every_other_command_has_its_own_help(ditbench, command):
    outcome = ditbench(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: ditbench {command}")


def test_the_version_is_printed(ditbench):
    import ditbench as package

    assert ditbench("--version").out == f"ditbench {package.__version__}\n"


LISTED = {
    "methods": ("fp", "rtn", "smoothquant", "strength=0.5", "quarot", "ptq4dit"),
    "models": ("tiny-dit", "tiny-dit-stress", "outlier", "dit-xl-2-256", "DiT-XL/2"),
    "metrics": ("psnr", "higher is better", "per sample", "torchmetrics/fid", "lower is better", "per set"),
    "backends": ("simulate", "onednn_int8", "real", "simulated", "W4A4", "cpu", "why not"),
    "prompts": ("shapes-calibration", "geneval", "vbench", "protocol.prompts=FILE"),
    "protocols": ("default", "ptq4dit", "10,000 images", "mlperf_wan22", "mlperf_sdxl"),
    "bits": ("w8a8", "w4a4", "w3a4", "w8a16", "granularity=per_channel", "granularity=per_token"),
}


def test_these_are_all_the_lists_there_are():
    assert set(LISTED) == set(listing.KINDS)


def test_files_that_others_are_based_on_are_not_listed(ditbench, tmp_path):
    for command in (("list", "models"), ("doctor", "--results-dir", str(tmp_path))):
        assert "tiny-t2i" in ditbench(*command).out and "_t2i " not in ditbench(*command).out


@pytest.mark.parametrize("kind", LISTED)
def test_a_list_names_what_there_is(ditbench, kind):
    outcome = ditbench("list", kind)
    assert outcome.code == 0 and outcome.err == ""
    for word in LISTED[kind]:
        assert word in outcome.out


def test_every_listed_bit_width_and_protocol_can_be_chosen(ditbench):
    for label in ditbench("list", "bits").out.partition("defaults")[0].split()[::9]:
        assert ditbench("run", "--cfg", "job", f"bits={label}").code == 0
    for line in ditbench("list", "protocols").out.splitlines()[1:]:
        if line.startswith(" "):
            continue  # the line before goes on
        assert ditbench("run", "--cfg", "job", f"protocol={line.split()[0]}").code == 0


def test_the_doctor_reports_on_every_part(ditbench, tmp_path):
    outcome = ditbench("doctor", "--results-dir", str(tmp_path / "not" / "yet"))
    assert outcome.code == 0
    sections = [line for line in outcome.out.splitlines() if line and not line.startswith(" ")]
    assert sections == ["missing", "device", "packages", "kernels", "methods", "models", "metrics", "W&B", "results"]
    assert "MISSING" not in outcome.out
    assert re.search(r"^  tiny-dit +shipped$", outcome.out, re.MULTILINE)
    assert f"{tmp_path / 'not' / 'yet'}: writable" in outcome.out
    assert not (tmp_path / "not").exists(), "the doctor only looks"


def test_the_doctor_says_how_to_get_what_is_missing(ditbench, monkeypatch, tmp_path):
    from ditbench.harness.cli import doctor

    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    said = ditbench("doctor", "--results-dir", str(tmp_path)).out
    first = said.partition("\ndevice\n")[0]
    assert re.search(r"the package torch +pip install torch +ditbench", first)
    assert re.search(r"weights of tiny-dit +ditbench zoo train tiny-dit +model=tiny-dit", first)
    assert "missing: ditbench zoo train tiny-dit" in said
    assert "torch MISSING" in said
    assert "NOT WRITABLE: set results_dir=" in said


def test_the_doctor_leads_with_the_compiler_that_a_kernel_lacks(ditbench, monkeypatch, tmp_path):
    from ditbench.harness.backends import vnni, vnni_extension

    def lacks():
        return MachineLacks("vnni needs g++ on the PATH: it is compiled on first use", "apt-get install g++")

    for module in (vnni, vnni_extension):  # by its own name, and as all others call it
        monkeypatch.setattr(module, "cpu_lacks", lacks)
    lines = ditbench("doctor", "--results-dir", str(tmp_path)).out.splitlines()
    assert lines[0] == "missing" and re.match(
        r"  vnni needs g\+\+ on the PATH.* apt-get install g\+\+  +W8A8, .*W4A8", lines[2]
    )
    (row,) = [line for line in lines if re.match(r"  W4A8 +cpu ", line)]
    assert "simulated" in row and "vnni needs g++ on the PATH" in row and "cuda" not in row


def test_a_machine_that_lacks_nothing_is_told_so(ditbench, monkeypatch, tmp_path):
    from ditbench.harness.cli import doctor

    monkeypatch.setattr(doctor, "_problems_of_metrics", dict)
    monkeypatch.setattr(doctor, "machine_lacks", list)
    assert ditbench("doctor", "--results-dir", str(tmp_path)).out.splitlines()[:2] == ["missing", "  nothing"]


@pytest.mark.parametrize("command", ["doctor", *(f"list {kind}" for kind in listing.KINDS)])
def test_lists_and_doctor_fit_120_columns(ditbench, command):
    lines = ditbench(*command.split()).out.splitlines()
    assert lines and max(map(len, lines)) <= 120


def test_a_kernel_s_reason_is_one_that_could_be_on_this_device(ditbench):
    text = ditbench("list", "backends").out.partition("why not")[2]
    assert "the device is" not in text and "FP8" in text


def test_check_method_prints_one_line_per_question(ditbench):
    outcome = ditbench("check-method", "rtn")
    assert outcome.code == 0
    first, *answers = outcome.out.splitlines()
    assert first.startswith("rtn: RTN: round to nearest")
    assert len(answers) == 8 and all(line.startswith("  ok    ") for line in answers)


def test_the_configuration_is_printed_without_a_run(run, tmp_path):
    outcome = run("--cfg", "job", "method=smoothquant", "method.strength=0.6", "bits=w4a8")
    assert outcome.code == 0 and outcome.err == ""
    config = yaml.safe_load(outcome.out)
    assert config["method"]["name"] == "smoothquant" and config["method"]["strength"] == 0.6
    assert config["bits"]["label"] == "w4a8" and config["bits"]["weight"]["bits"] == 4
    assert config["protocol"]["n"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_format_may_be_written_as_tables_print_it(run):
    config = yaml.safe_load(run("--cfg", "job", "bits=WNVFP4_AFP8").out)
    assert config["bits"]["label"] == "wnvfp4_afp8"


def test_flags_may_stand_between_the_overrides(run, tmp_path):
    outcome = run("bits=w4a8", "-m", "method=smoothqant", "protocol.n=8")
    assert "did you mean 'smoothquant'?" in outcome.err
    assert yaml.safe_load(run("bits=w4a8", "--cfg", "job", "seed=7").out)["seed"] == 7


def test_a_report_is_a_table_for_the_terminal_unless_the_file_it_is_written_to_says_otherwise(
    ditbench, finished, tmp_path
):
    outcome = ditbench("report", "--results-dir", str(tmp_path))
    assert outcome.code == 0 and "rtn     W8A8" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    for name, start in (("a.md", "### "), ("a.csv", "group,"), ("a.tex", "% needs"), ("a.txt", "tiny-dit")):
        assert ditbench("report", "--results-dir", str(tmp_path), "--out", str(tmp_path / name)).code == 0
        assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize("format", ["md", "csv", "latex"])
def test_a_report_is_printed_in_every_text_format(ditbench, finished, tmp_path, format):
    outcome = ditbench("report", "--format", format, "--results-dir", str(tmp_path))
    assert outcome.code == 0
    if format == "csv":
        (row,) = csv.DictReader(io.StringIO(outcome.out))
        assert (row["method"], row["bits"], row["status"]) == ("rtn", "W8A8", "ok") and float(row["psnr"]) > 20
    else:
        assert {"md": "| rtn | W8A8 |", "latex": r"rtn & W8A8 &"}[format] in outcome.out


def test_an_html_report_is_a_file_whose_path_is_printed(ditbench, finished, tmp_path):
    outcome = ditbench("report", "--format", "html", "--results-dir", str(tmp_path))
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == str(tmp_path / "report.html")
    assert "rtn" in (tmp_path / "report.html").read_text()


def test_a_report_goes_to_the_file_that_is_named(ditbench, finished, tmp_path):
    assert ditbench("report", "--results-dir", str(tmp_path), "--out", str(tmp_path / "table.md")).code == 0
    assert "| rtn | W8A8 |" in (tmp_path / "table.md").read_text()


def test_a_report_of_one_experiment_leaves_the_others_out(ditbench, finished, tmp_path):
    folder = tmp_path / "runs" / "other" / finished.parent.name
    shutil.copytree(finished.parent, folder)
    values = hashed_json.read(folder / "record.json") | {"experiment": "other"}
    (folder / "record.json").write_text(hashed_json.text_of(values))

    def experiments(*arguments):
        printed = ditbench("report", "--format", "csv", "--results-dir", str(tmp_path), *arguments).out
        return [row["experiment"] for row in csv.DictReader(io.StringIO(printed))]

    assert sorted(experiments()) == ["default", "other"]
    assert experiments("--experiment", "other") == ["other"]


def test_two_methods_are_compared_sample_by_sample(run, ditbench, tmp_path):
    assert run("-m", "method=rtn,smoothquant", "bits=w4a4", "name=two").code == 0
    outcome = ditbench("compare", "two", "--metric", "psnr", "--results-dir", str(tmp_path))
    assert outcome.code == 0 and "rtn − smoothquant" in outcome.out
    assert "n = 4 pairs of samples" in outcome.out and "sqnr" not in outcome.out
    refused = ditbench("compare", "tow", "--results-dir", str(tmp_path))
    assert refused.code == 2 and "did you mean 'two'?" in refused.err
