"""`ditbench paper` and `ditbench reproduce`: what they show, the plan, what is refused, and a tiny run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ditbench.harness.fitting import registry
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.counts import counted
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.papers import reported, reproduce
from ditbench.harness.papers.reproduce import requirements, sizes
from ditbench.harness.sweep.compose import composed

TINY = (
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "tracker=none",
    "generate.noise_floor_seeds=0",
    "metrics.resamples=5",
    "measure.repeats=2",
    "measure.warmup=0",
    "measure.samples=1",
    "measure.layer_errors=false",
)
REPRODUCIBLE = [each.name for each in reported.tables().values() if each.reproduce]


@pytest.fixture
def wide(monkeypatch):
    """One line for each row, however long."""
    monkeypatch.setattr("ditbench.harness.common.text_table.columns", lambda: 1000)


# ditbench paper


def test_the_list_names_every_table_and_what_could_not_be_had(ditbench):
    outcome = ditbench("paper", "list")
    assert outcome.code == 0 and outcome.err == ""
    for name in reported.tables():
        assert re.search(rf"^{name} ", outcome.out, re.MULTILINE)
    assert "not here: HTG" in outcome.out


@pytest.mark.parametrize("name", reported.tables())
def test_a_table_is_shown_with_every_row_its_protocol_source_and_confidence(ditbench, wide, name):
    outcome = ditbench("paper", "show", name)
    assert outcome.code == 0 and outcome.err == ""
    shown = reported.table(name)
    for row in shown.rows:
        cells = [*row.keys.values(), *(reported.EMPTY if value is None else value for value in row.values.values())]
        line = next(line for line in outcome.out.splitlines() if all(str(cell) in line for cell in cells))
        assert line
        assert f"confidence {row.confidence}: " in outcome.out and f"source {row.source}: " in outcome.out
    for value in shown.protocol.values():
        assert str(value) in " ".join(outcome.out.split())


@pytest.mark.parametrize("command", [("list",), *(("show", name) for name in reported.tables())])
def test_tables_of_papers_fit_120_columns(ditbench, command):
    words = 120
    for line in ditbench("paper", *command).out.splitlines():
        whole = line.startswith("ditbench ") or " " not in line.strip()
        assert len(line) <= words or whole, "a path, an address and a command stay in one piece"


def test_a_table_is_found_by_its_id_too(ditbench):
    by_name, by_id = (
        ditbench("paper", "show", "ptq4dit-table1"),
        ditbench("paper", "show", "ptq4dit_table1_imagenet256"),
    )
    assert by_name.out == by_id.out
    assert "12.553" in by_name.out and "WARNING" in by_name.out


@pytest.mark.parametrize("command", [("paper", "show"), ("reproduce",)])
def test_an_unknown_table_is_guessed_at(ditbench, command):
    outcome = ditbench(*command, "ptq4dit-tabel1")
    assert outcome.code == 2
    assert "no paper table 'ptq4dit-tabel1'; did you mean 'ptq4dit-table1'?" in outcome.err


def test_show_without_a_name_says_where_the_names_are(ditbench):
    for command in (("paper", "show"), ("reproduce",), ("reproduce", "protocol.n=4")):
        outcome = ditbench(*command)
        assert outcome.code == 2 and "which table? `ditbench paper list` names them" in outcome.err


@pytest.mark.parametrize("stem", ["htg", "lrq_dit"])
def test_tables_that_could_not_be_had_are_shown_with_a_file_to_fill_in(ditbench, stem, tmp_path):
    said = ditbench("paper", "show", stem).out
    assert "the tables could not be obtained" in said and "docs/papers.md" in said
    file = tmp_path / "mine.yaml"
    file.write_text(said[said.index("paper: ") :])
    shown = ditbench("paper", "show", "--table", str(file))
    assert shown.code == 0 and f"--table {file} --plan" in shown.out


# ditbench reproduce --plan


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_a_plan_says_what_the_real_table_needs(ditbench, name, unsized):
    outcome = ditbench("reproduce", name, "--plan")
    assert outcome.code == 0 and outcome.err == ""
    said, section = " ".join(outcome.out.split()), reported.table(name).reproduce
    words = ["metrics.reference=FILE", *section.reference.address.split()] if section.reference else []
    for word in (
        *words,
        "weights: https://huggingface.co/",
        "methods here",
        *section.departs.values(),
        *section.metrics,
    ):
        assert word in said


@pytest.fixture
def unsized(monkeypatch):
    """No hours and no memory, which take a minute of every table."""
    monkeypatch.setattr(requirements, "sizes", lambda _: sizes.Sizes())


def test_a_plan_has_hours_memory_and_disk_by_a_model_of_the_same_shapes(ditbench, monkeypatch):
    small = ("model=dit-xl-2-256-random", "model.random.num_layers=1", "model.random.num_attention_heads=1")
    monkeypatch.setitem(sizes.SAME_SHAPES, "dit-xl-2-256", small)
    said = ditbench("reproduce", "qdit-table1-cfg1", "--plan").out
    for line in (
        r"operations +\S+ \S?MAC in 2 runs",
        r"GPU hours +≥ \S+ at 33% of an H100's peak in each stage's dtype \(arithmetic: nothing was",
        r"hours here +≥ ",
        r"planned +dit-xl-2-256 by dit-xl-2-256-random: of the same shapes, since its weights are not here",
        r"memory +at most device \S+ \SB, host \S+ \SB \(memory=resident\) or device \S+ \SB",
        r"disk +\S+ \SB, and the weights",
        r"not counted +what of dit-xl-2-256 is not its transformer: VAE",
    ):
        assert re.search(line, said), line


def test_a_model_without_known_shapes_is_named_and_the_rest_is_said(ditbench):
    outcome = ditbench("reproduce", "viditq-opensora", "--plan")
    assert outcome.code == 0
    assert re.search("unknown size +opensora-1.2: ", outcome.out) and "GPU hours" not in outcome.out
    assert "for 17 of 17 rows" in outcome.out


@pytest.mark.parametrize("model", sorted(sizes.SAME_SHAPES))
def test_the_shapes_that_stand_in_for_weights_make_a_model(model):
    (raw,) = composed([sizes.SAME_SHAPES[model]])
    spec = {key: value for key, value in raw["model"].items() if key != "usual"}
    bare = skeleton(ModelSpec(**spec))
    assert counted(bare, Sampler("pipeline", 2, 1.0)).call_macs > 1e10
    billions = {
        "flux.1-schnell": 11.9,
        "hunyuan-video": 12.8,
        "cogvideox-5b": 5.6,
        "sana-1600m-1024": 1.6,
        "z-image-turbo": 6.2,
    }
    parameters = sum(each.numel() for each in bare.transformer.parameters()) / 1e9
    assert parameters == pytest.approx(billions.get(model, 0.65), rel=0.2)


def test_a_plan_counts_runs_images_and_transformer_calls(ditbench, monkeypatch, unsized):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit", "rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan", "generate.noise_floor_seeds=0").out
    # 3 methods at bits (FP, W8A8, W4A8) × 250, 100, 50 steps; per number of steps the float model's images and 32 for
    # calibration; batches of 64 (157 of them) and of 32.
    assert "9, for 9 of 33 rows" in said
    assert f"{(9 + 3) * 10_000 + 3 * 32:,} in 15 sets" in said
    assert f"{157 * (3 + 1) * 400 + 400:,} calls" in said
    assert f"{2 * (10_000 * (3 + 1) * 400 + 32 * 400):,} rows" in said
    for name in ("PTQ4DM", "Q-Diffusion", "PTQD", "RepQ*"):
        assert f"method {name}: 6 rows" in " ".join(said.split())
    assert "12.553" in said
    assert "ptq4dit departs from its paper" in said and "not computed here: size_mb (ditbench" in said


def test_a_method_is_found_here_as_soon_as_it_is_installed(ditbench, monkeypatch, unsized):
    here = {"fp": registry.method("fp"), "ptq4dit": registry.method("ptq4dit"), "ptqd": registry.method("rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan").out
    assert "PTQD (ptqd)" in said and "15, for 15 of 33 rows" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("svdquant-speed",), ("svdquant-speed", "cannot be run here: speeds of kernels", "ditbench bench")),
        (("clq-efficiency",), ("cannot be run here: neither hardware nor kernel is stated",)),
        (("ptq4dit-table1", "model=tiny-dit"), ("model=", "--model")),
        (("ptq4dit-table1", "bits=w4a4"), ("bits=", "the table says it")),
        (("ptq4dit-table1", "--model", "tinydit"), ("no model 'tinydit'", "did you mean 'tiny-dit'")),
        (("ptq4dit-table1", "protcol.n=4"), ("protcol",)),
        (("ptq4dit-table1", "--model", "tiny-dit", "protocol.n=0"), ("protocol.n must be a whole number",)),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_anything_runs(ditbench, arguments, words, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", *arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_missing_weights_prompts_and_images_of_every_model_are_one_message(ditbench, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", "svdquant-table1")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for word in ("FLUX.1-dev", "FLUX.1-schnell", "PixArt-Sigma", "mjhq-30k", "coco-2014", "reference images", "--plan"):
        assert word in outcome.err


def test_missing_weights_and_reference_are_one_message_before_anything_runs(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", "ptq4dit-table1", f"model.source={tmp_path / 'none'}")
    assert outcome.code == 2
    for word in ("model dit-xl-2-256", "VIRTUAL_imagenet256_labeled.npz", "metrics.reference=", "--plan"):
        assert word in outcome.err


# ditbench reproduce --model tiny-dit


def test_a_reproduction_on_tiny_dit_prints_every_row_and_why_it_is_not_comparable(
    ditbench, wide, tmp_path, monkeypatch
):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    forms = here["ptq4dit"].FORMS  # 20,000 iterations are not for a test
    short = replace(forms["published"], params=forms["published"].params | {"iterations": 2, "batch_size": 2})
    monkeypatch.setitem(forms, "published", short)
    outcome = ditbench("reproduce", "ptq4dit-table1", "--model", "tiny-dit", *TINY, f"results_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    lines = [re.split(r"  +", line) for line in outcome.out.splitlines()]
    for row in reported.table("ptq4dit-table1").rows:
        for column in ("FID", "IS", "Precision"):  # sFID has no counterpart in the judge's features
            wanted = [*map(str, row.keys.values()), column, str(row.values[column])]
            (line,) = (line for line in lines if line[: len(wanted)] == wanted)
            if row.name in ("FP", "PTQ4DiT"):
                assert re.fullmatch(r"not comparable \[\d\]", line[-1]), line
                assert line[5] != reported.EMPTY
            else:
                assert line[-1] == f"not here: method {row.name}"
    for reason in (
        "[1] model, steps, n, calibration.n, features",
        "model: tiny-dit, not dit-xl-2-256",
        "n: 4, not 10000",
        "steps: 2, not 250; 2, not 100; 2, not 50",
        "calibration.n: 2, not 32",
        "(the zoo judge's), not torch_fidelity/fid (Inception's)",
        "reference: digits-1797, not VIRTUAL_imagenet256_labeled.npz",
        "simulated: 2 of 3 runs",
        "FID 12.553",
    ):
        assert reason in " ".join(outcome.out.split())
    assert "within\n" not in outcome.out and "outside\n" not in outcome.out
    records = list(tmp_path.glob("runs/reproduce-ptq4dit-table1/*/record.json"))
    configs = [json.loads(record.read_text())["config"]["method"] for record in records]
    assert sorted((each["name"], each["form"]) for each in configs) == [
        ("fp", "published"),
        *[("ptq4dit", "published")] * 2,
    ]
    assert len(records) == 3, "rows at 250, 100 and 50 steps share one run when the steps are overridden"


# tables of a user, and the forms of a result

MINE = """
paper: mine
sources: {me: my own}
tables:
  - id: mine
    name: mine
    source: me
    confidence: primary
    keys: [bits, method]
    columns: [PSNR, Odd]
    reproduce:
      model: tiny-dit
      overrides: {protocol.n: 4, protocol.steps: 2, calibration.n: 2}
      metrics: {PSNR: psnr}
      tolerance: {PSNR: 100}
      steps: 2
      lacks: {Nobody's: "a method & a_name"}
    rows:
      - {bits: W8A8, method: RTN, PSNR: 40}
      - {bits: W8A8, method: "Nobody's", PSNR: 41.5}
"""


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_a_table_of_ones_own_is_run_and_printed_in_every_form(ditbench, tmp_path, form):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    outcome = ditbench("reproduce", "--table", str(file), "--format", form, *TINY, f"results_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if "W8A8" in line]
    assert re.search("RTN.*PSNR.*40.*within", rows[0])
    assert re.search("Nobody's.*41.5.*not here: method Nobody's", rows[1])
    assert "method Nobody's (a method" in outcome.out
    if form == "markdown":
        assert {line.count(" | ") for line in rows} == {7} and rows[0].startswith("| W8A8 | RTN | PSNR | 40 | ")
        assert r"a\_name" in outcome.out
    if form == "latex":
        assert all(line.count("&") == 7 and line.endswith(r" \\") for line in rows)
        assert r"\toprule" in outcome.out and r"$\Delta$" in outcome.out
        assert all(line.startswith("%") for line in outcome.out.splitlines() if "a method & a_name" in line)


def test_a_result_is_a_page_too_with_its_run_and_its_verdicts(ditbench, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    told = ditbench("reproduce", "--table", str(file), "--format", "html", *TINY, f"results_dir={tmp_path}")
    assert told.code == 0 and "2 values: 1 within, 1 not here" in told.out
    page = Path(told.out.splitlines()[-1])
    assert page == tmp_path / "reproduce-mine.html"
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    data = json.loads(found)
    (run,) = data["rows"]
    assert [(row["run"], row["kind"]) for row in data["paper"]["rows"]] == [(run["key"], "within"), (None, "not here")]
    assert data["paper"]["header"][: data["paper"]["names"]] == ["bits", "method"]
    table = tmp_path / "t.tex"
    again = ditbench(
        "reproduce", "--table", str(file), "--format", "latex", "--out", str(table), *TINY, f"results_dir={tmp_path}"
    )
    assert again.out.splitlines()[-1] == str(table) and r"\toprule" in table.read_text()


def test_a_plan_says_the_form_that_runs_and_what_is_set_by_hand(ditbench):
    said = ditbench("reproduce", "ptq4dit-table3", "--plan", "--model", "tiny-dit", "method.iterations=7").out
    said = " ".join(said.split())
    assert "ptq4dit, form=published: error_over=tokens, iterations=7, " in said and "parts=none" in said
    assert "ptq4dit departs from its paper (said of form=default; here form=published runs): 100 iterations" in said


def test_a_file_of_several_tables_asks_which(ditbench, tmp_path):
    file = tmp_path / "two.yaml"
    table = MINE[MINE.index("  - id") :]
    file.write_text(MINE + table.replace("mine", "other"))
    outcome = ditbench("reproduce", "--table", str(file), "--plan")
    assert outcome.code == 2 and "it has 2 tables; name one: mine, other" in outcome.err
