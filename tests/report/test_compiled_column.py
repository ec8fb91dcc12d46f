"""Which bf16 a speed-up is against, and the column of compiled blocks."""

from __future__ import annotations

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare
from ditbench.harness.report.frame import frame
from ditbench.harness.report.table import table

COMPILED = {"compiled_speedup": 1.58, "compiled_baseline": "the same transformer in bf16, its blocks compiled"}


def group_of(results_dir):
    (group,) = compare.groups(read_all(results_dir))
    return group


def cell(group, method, title):
    built = table(group, ["psnr"])
    place = [column.title for column in built.columns].index(title)
    return next(row.cells[place] for row in built.rows if row.cells[0].text == method)


def test_the_speed_up_says_its_baseline_and_that_of_compiled_blocks_has_a_column_where_it_was_asked_for(
    add_run, results_dir
):
    add_run("rtn", "W8A8", measured=True, efficiency={"baseline": "the same transformer in bf16, eager"})
    titles = [column.title for column in table(group_of(results_dir), ["psnr"]).columns]
    assert "compiled" not in titles
    assert cell(group_of(results_dir), "rtn", "speed-up").tip.endswith("; against the same transformer in bf16, eager")
    add_run("gptq", "W8A8", measured=True, efficiency=COMPILED)
    group = group_of(results_dir)
    found = cell(group, "gptq", "compiled")
    assert found.text == "1.58" and found.tip == COMPILED["compiled_baseline"]
    assert cell(group, "rtn", "compiled").text == "–"
    assert frame([group]).set_index("run")["compiled_speedup"]["gptq"] == 1.58
