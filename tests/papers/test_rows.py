"""A table's rows become configurations of runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditbench.harness.common.errors import UserError
from ditbench.harness.papers import reported
from ditbench.harness.papers.reproduce import rows
from ditbench.harness.quant.spec import QuantSpec

REPRODUCIBLE = [each.name for each in reported.tables().values() if each.reproduce]


def test_without_overrides_another_model_takes_its_usual_n_and_steps():
    table = reported.table("ptq4dit-table1")
    lines = [line for line in rows.plan_lines(table, table.reproduce, "tiny-dit", ()) if line.job]
    assert len(lines) == len(table.rows)
    for config in rows.configurations(line.job for line in lines).values():
        assert (config["protocol"]["n"], config["protocol"]["steps"]) == (256, 20)
        assert (config["protocol"]["sampler"], config["protocol"]["scope"]) == ("ddpm", "all")


def test_the_ablation_turns_off_what_its_rows_name():
    table = reported.table("ptq4dit-table3")
    lines = rows.plan_lines(table, table.reproduce, None, ())
    assert [line.job is None for line in lines] == [False, True, False], "salience at t = T/2 has no counterpart"
    bare, whole = rows.configurations(line.job for line in lines).values()
    assert (bare["method"]["parts"], whole["method"]["parts"]) == ("none", "csb+ssc")
    assert bare["bits"]["label"] == "w4a8" and bare["protocol"]["steps"] == 250


@pytest.mark.parametrize(("printed", "label"), [("W4A8", "w4a8"), ("FP8", "fp8")])
def test_a_rows_bits_are_those_that_it_runs_with(printed, label):
    table = reported.table("ptq4dit-table1")
    row = next(row for row in table.rows if row.name == "PTQ4DiT")
    row = replace(row, keys=row.keys | {"bits": printed})
    (line, *_) = rows.plan_lines(replace(table, rows=(row,)), table.reproduce, None, ())
    assert f"bits={label}" in line.job


LACKING = {
    "method": {
        "TFMQ-DM", "G4W+P4A", "CSB (salience at t=T/2)", "+ group size 128", "ILP", "Hessian", "AdaTSQ", "S2Q-VDiT",
        "Q-VDiT", "QuantSparse-40pct", "NF4", "MixDQ", "TensorRT",
    },
    "model": {"SDXL", "SDXL-Turbo"},
    "format": set(),
}  # fmt: skip


def test_rows_in_blocks_can_be_composed_with_every_method_that_has_them():
    for name in ("svdquant-table1", "svdquant-readme"):
        table = reported.table(name)
        lines = [
            line
            for line in rows.plan_lines(table, rows.reproducible(table), None, ())
            if "bits=nvfp4" in (line.job or ())
        ]
        assert len(lines) >= 3
        for config in rows.configurations(line.job for line in lines).values():
            sides = config["bits"]["weight"], config["bits"]["act"]
            assert config["bits"]["label"] == "nvfp4" and all(QuantSpec(**side).name == "NVFP4" for side in sides)


def test_what_the_reproducible_tables_lack_is_known_and_nothing_else():
    found = {"method": set(), "model": set(), "format": set()}
    for name in REPRODUCIBLE:
        table = reported.table(name)
        for line in rows.plan_lines(table, rows.reproducible(table), None, ()):
            assert (line.job is None) == bool(line.lacks)
            for lack in line.lacks:
                kind, _, what = lack.partition(" ")
                found[kind].add(what)
    assert found == LACKING


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_what_a_reproducible_table_lacks_has_a_reason_or_a_name_that_says_it(name):
    section = reported.table(name).reproduce
    left = [column for column in reported.table(name).columns if column not in section.metrics]
    assert {column for column in left if column not in section.lacks} <= {"size_mb"}


def test_every_paper_of_the_issue_can_be_reproduced():
    for start in ("clq-table3", "clq-table4", "ptq4dit-", "qdit-", "viditq-", "svdquant-", "adatsq-", "s2qvdit-", "dvdquant-", "quantsparse-"):  # fmt: skip
        assert any(name.startswith(start) for name in REPRODUCIBLE), start


def test_a_table_that_cannot_be_run_says_why():
    for each in reported.tables().values():
        assert bool(each.reproduce) != bool(each.cannot_run), each.name


def test_rows_of_several_models_run_on_their_own_and_on_one_where_it_is_tried():
    table = reported.table("svdquant-table1")
    own = rows.plan_lines(table, table.reproduce, None, ())
    of = {line.row.keys["model"]: line for line in own if line.job}
    assert {name: line.job[1] for name, line in of.items()} == {
        "FLUX.1-dev": "model=flux.1-dev",
        "FLUX.1-schnell": "model=flux.1-schnell",
        "PixArt-Sigma": "model=pixart-sigma-xl-2-1024",
    }
    assert "protocol.steps=4" in of["FLUX.1-schnell"].job
    tried = [line for line in rows.plan_lines(table, table.reproduce, "tiny-t2i", ()) if line.job]
    assert any(line.row.keys["model"] == "SDXL" for line in tried)
    assert all(line.expected is None for line in tried if line.row.keys["model"] == "SDXL")
    (config, *_) = rows.configurations(line.job for line in tried).values()
    assert (config["model"]["name"], config["protocol"]["prompts"]) == ("tiny-t2i", "shapes")
    assert "geneval_shapes/overall" in config["metrics"]["names"]


def test_on_the_papers_model_only_its_metrics_are_computed():
    table = reported.table("clq-table3")
    (line, *_) = rows.plan_lines(table, table.reproduce, None, ())
    (config,) = rows.configurations([line.job]).values()
    assert config["metrics"]["names"] == list(table.reproduce.metrics.values())
    assert config["protocol"]["n"] == 4 * 553


def test_text_with_odd_characters_reaches_the_configuration_as_it_is():
    table = reported.table("clq-table3")
    odd = "it's a (sum), [x] = {y} \\ z\\"
    section = replace(table.reproduce, overrides={"protocol.prompts": odd, "model.revision": None})
    (line, *_) = rows.plan_lines(table, section, None, ())
    (config,) = rows.configurations([line.job]).values()
    assert config["protocol"]["prompts"] == odd and config["model"]["revision"] is None


def test_prompts_that_are_not_here_do_not_hide_what_the_paper_asks_for():
    table = reported.table("clq-table3")
    (line, *_) = rows.plan_lines(table, table.reproduce, None, ())
    (config,) = rows.configurations([line.job]).values()
    assert rows.settings_of(config)["protocol"]["prompts"] == "geneval"
    assert rows.prompts_here(config)["protocol"]["prompts"] == "shapes"


def test_formats_that_a_paper_writes_its_own_way_are_said_by_the_table():
    table = reported.table("svdquant-table1")
    section = replace(table.reproduce, bits={"FP W4A4": "w4a4"})
    lines = rows.plan_lines(table, section, None, ())
    assert sum("bits=w4a4" in (line.job or ()) for line in lines) == 4 + 3
    with pytest.raises(UserError, match="bits: FP W4A4: no format 'w44'; did you mean 'w4a4'"):
        rows.plan_lines(table, replace(section, bits={"FP W4A4": "w44"}), None, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "tinydit"},
        {"overrides": {"protcol.n": 4}},
        {"overrides": {"a b": 4}},
        {"rows": {"PTQ4DiT": ["method=ptq4dit", "method.iterationz=3"]}},
        {"metrics": {"FID": "torch_fidelity/fit"}},
    ],
)
def test_what_a_table_asks_of_ditbench_and_is_not_there_is_an_error_of_a_line(changes):
    table = reported.table("ptq4dit-table1")
    with pytest.raises(UserError) as refusal:
        section = rows.reproducible(replace(table, reproduce=replace(table.reproduce, **changes)))
        rows.configurations(line.job for line in rows.plan_lines(table, section, None, ()))
    assert "\n" not in str(refusal.value)


def test_a_setting_of_methods_is_for_the_rows_whose_method_has_it():
    table = reported.table("ptq4dit-table1")
    lines = rows.plan_lines(table, table.reproduce, "small-dit", ("method.iterations=3", "method.form=default"))
    have = {line.row.name for line in lines if "method.iterations=3" in line.job}
    assert have == {"PTQ4DM", "Q-Diffusion", "PTQD", "PTQ4DiT"}
    assert all("method.form=default" in line.job for line in lines)
    with pytest.raises(UserError, match="method.iterationz=3: no method of ptq4dit-table1"):
        rows.plan_lines(table, table.reproduce, None, ("method.iterationz=3",))
