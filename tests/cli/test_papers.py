"""`ditbench paper` and `ditbench reproduce`: what they show, the plan, what is refused, and a tiny run."""

from __future__ import annotations

import re

import pytest

from ditbench.harness.fitting import registry
from ditbench.harness.papers import reported, reproduce

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


# ditbench paper


def test_the_list_names_every_table_and_what_could_not_be_had(ditbench):
    outcome = ditbench("paper", "list")
    assert outcome.code == 0 and outcome.err == ""
    for name in reported.tables():
        assert re.search(rf"^{name} ", outcome.out, re.MULTILINE)
    assert "not here: HTG" in outcome.out


@pytest.mark.parametrize("name", reported.tables())
def test_a_table_is_shown_with_every_row_its_protocol_source_and_confidence(ditbench, name):
    outcome = ditbench("paper", "show", name)
    assert outcome.code == 0 and outcome.err == ""
    shown = reported.table(name)
    for row in shown.rows:
        cells = [*row.keys.values(), *(reported.EMPTY if value is None else value for value in row.values.values())]
        line = next(line for line in outcome.out.splitlines() if all(str(cell) in line for cell in cells))
        assert line
        assert f"confidence {row.confidence}: " in outcome.out and f"source {row.source}: " in outcome.out
    for value in shown.protocol.values():
        assert str(value) in outcome.out


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
    outcome = ditbench("paper", "show")
    assert outcome.code == 2 and "ditbench paper list" in outcome.err


# ditbench reproduce --plan


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_a_plan_says_what_the_real_table_needs(ditbench, name, monkeypatch):
    monkeypatch.setattr(reproduce, "model_of", lambda _: pytest.fail("a plan loads nothing"))
    here = {"q_dit": registry.method("rtn")} | registry.known_methods()  # of one table it is the only method
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    outcome = ditbench("reproduce", name, "--plan")
    assert outcome.code == 0 and outcome.err == ""
    section = reported.table(name).reproduce
    for word in (
        "huggingface.co/facebook/DiT-XL-2-",
        section.reference.address,
        "GiB",
        "methods here",
    ):
        assert word in outcome.out


def test_a_plan_counts_runs_images_and_transformer_calls(ditbench, monkeypatch):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit", "rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan", "generate.noise_floor_seeds=0").out
    # 3 methods at bits (FP, W8A8, W4A8) × 250, 100, 50 steps; per number of steps the float model's images and 32 for
    # calibration; batches of 64 (157 of them) and of 32.
    assert "9, for 9 of 33 rows" in said
    assert f"{(9 + 3) * 10_000 + 3 * 32:,} in 15 sets" in said
    assert f"{157 * (3 + 1) * 400 + 400:,} calls" in said
    assert f"{2 * (10_000 * (3 + 1) * 400 + 32 * 400):,} rows" in said
    assert re.search(r"not in ditbench yet +PTQ4DM, Q-Diffusion, PTQD, RepQ\*", said)
    assert "12.553" in said
    assert "ptq4dit departs from its paper" in said and "not computed here: size_mb, sFID" in said


def test_a_method_is_found_here_as_soon_as_it_is_installed(ditbench, monkeypatch):
    here = {"fp": registry.method("fp"), "ptq4dit": registry.method("ptq4dit"), "ptqd": registry.method("rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan").out
    assert "PTQD (ptqd)" in said and "15, for 15 of 33 rows" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("svdquant-table1",), ("svdquant-table1", "cannot be run", "ptq4dit-table1")),
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


def test_missing_weights_and_reference_are_one_message_before_anything_runs(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", "ptq4dit-table1", f"model.source={tmp_path / 'none'}")
    assert outcome.code == 2
    for word in ("model dit-xl-2-256", "VIRTUAL_imagenet256_labeled.npz", "metrics.reference=", "--plan"):
        assert word in outcome.err


# ditbench reproduce --model tiny-dit


def test_a_reproduction_on_tiny_dit_prints_every_row_and_why_it_is_not_comparable(ditbench, tmp_path, monkeypatch):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    outcome = ditbench("reproduce", "ptq4dit-table1", "--model", "tiny-dit", *TINY, f"results_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    lines = [re.split(r"  +", line) for line in outcome.out.splitlines()]
    for row in reported.table("ptq4dit-table1").rows:
        for column in ("FID", "IS", "Precision"):
            wanted = [*map(str, row.keys.values()), column, str(row.values[column])]
            (line,) = (line for line in lines if line[: len(wanted)] == wanted)
            if row.name in ("FP", "PTQ4DiT"):
                assert line[-1].startswith("not comparable: model, steps, n, calibration.n, features"), line
                assert line[5] != reported.EMPTY
            else:
                assert line[-1] == "not in ditbench yet"
    for reason in (
        "model: tiny-dit, not dit-xl-2-256",
        "n: 4, not 10000",
        "steps: 2, not 250; 2, not 100; 2, not 50",
        "calibration.n: 2, not 32",
        "(the zoo judge's), not torch_fidelity/fid (Inception's)",
        "reference: digits-1797, not VIRTUAL_imagenet256_labeled.npz",
        "simulated: 2 of 3 runs",
        "FID 12.553",
    ):
        assert reason in outcome.out
    assert "within\n" not in outcome.out and "outside\n" not in outcome.out
    records = list(tmp_path.glob("runs/reproduce-ptq4dit-table1/*/record.json"))
    assert len(records) == 3, "rows at 250, 100 and 50 steps share one run when the steps are overridden"
