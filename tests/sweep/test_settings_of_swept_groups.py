"""A setting is looked for in what each job has chosen, and not in the default that stands where a group is swept."""

from __future__ import annotations

import pytest

from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import sweeps
from ditbench.harness.records.attempts import read_all
from ditbench.harness.sweep import compose
from ditbench.harness.sweep.multirun import multirun
from ditbench.harness.sweep.plan import configurations

BOTH = ("method=ptq4dm,q_diffusion", "method.iterations=400", "bits=w4a8")  # method=rtn, the default, has no iterations


def iterations(home) -> dict[str, int]:
    """{method: its setting} of the records."""
    return {each.method: each.config["method"]["iterations"] for each in read_all(home.parents[1])}


def test_a_setting_that_all_swept_methods_have_reaches_each(sweep, quick, home):
    quick()
    assert sweep(*BOTH) == 0
    assert iterations(home) == {"ptq4dm": 400, "q_diffusion": 400}


def test_so_does_one_that_only_the_experiments_file_sweeps_over(sweep, quick, home, tmp_path):
    quick()
    folder = tmp_path / "of_mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "both.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {method: 'ptq4dm,q_diffusion'}}}\n"
    )
    assert sweep("experiment=both", "method.iterations=400", "bits=w4a8", "--config-dir", str(folder.parent)) == 0
    assert iterations(home) == {"ptq4dm": 400, "q_diffusion": 400}


def test_jobs_are_tried_again_with_another_value_of_such_a_setting(sweep, quick, home, tmp_path):
    quick(lambda config: "failed")
    assert sweep(*BOTH) == 3
    quick()
    assert main(["retry", "swept", "--results-dir", str(tmp_path), "method.iterations=300"]) == 0
    assert {each.record.config["method"]["iterations"] for each in sweeps.outcomes(sweeps.newest(home))} == {300}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("method=ptq4dm,rtn method.iterations=400", "no setting of method 'iterations'; method=rtn has form, name"),
        ("method=ptq4dm,gptq method.n=400", "no setting of method 'n' (method=ptq4dm); did you mean calibration.n"),
        ("bits=mixed,w8a8 bits.budget.bytes=100000", "no setting of bits 'budget'; bits=w8a8 has act, label, weight"),
        ("bits=mixed,w8a8 bits.weight.odd=1", "no setting of bits.weight 'odd'; bits=mixed has bits, granularity,"),
        ("model=tiny-dit,tiny-t2i model.odd=1", "no setting of model 'odd'; model=tiny-dit has "),
        ("method=ptq4dm,q_diffusion sead=1", "no setting 'sead'; did you mean seed?"),
    ],
)
def test_a_choice_that_lacks_the_setting_is_named_before_anything_runs(sweep, quick, home, capsys, arguments, said):
    started = quick()
    assert sweep(*arguments.split()) == 2
    assert said in capsys.readouterr().err
    assert not started and not home.exists()


def test_a_plan_has_the_same_jobs():
    found, refused = configurations(["-m", *BOTH, "model=tiny-dit", "tracker=none"])
    assert [(each.method, each.params.iterations) for each in found] == [("ptq4dm", 400), ("q_diffusion", 400)]
    assert not refused


def test_before_a_sweeper_chooses_every_choice_it_has_is_asked_for_the_setting():
    compose.register()
    setting, swept = "method.iterations=400", "method.drop=interval(0,1)"
    lacking = pytest.raises(UserError, match="no setting of method 'iterations'; method=rtn has form, name")
    with multirun(["method=ptq4dm,q_diffusion,rtn", setting, swept, "-m"]) as sweep, lacking:
        sweep.check_left()
    with multirun([*BOTH, swept, "-m"]) as sweep:
        sweep.check_left()
