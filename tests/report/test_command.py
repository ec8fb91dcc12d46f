"""The command that a page shows beside a run gives, composed here, the configuration that the run was recorded with."""

from __future__ import annotations

import shlex

import pytest

from ditbench.harness.records.record import Record
from ditbench.harness.report.command import command_of
from ditbench.harness.sweep.compose import composed

RUNS = [
    ["method=rtn"],
    ["model=tiny-t2i", "method=svdquant", "method.form=published", "bits=w4a4", "protocol.n=8"],
    ["method=q_dit", "method.form=published", "bits=w4a8", "calibration.n=16"],
    ["bits=w4a4", "bits.weight.granularity=per_group", "bits.weight.group_size=32", "seed=7", "name=my-sweep"],
    ["bits=mixed", "bits.budget.average_weight_bits=6", "bits.candidates=[w4a4,w8a8]"],
    ["metrics=fidelity", "metrics.resamples=50", "model=small-dit", "protocol.skip=['a, b','^x\\.(y|z)$']"],
    ["bits=nvfp4", "method=svdquant", "bits.weight.four_over_six=true"],
    ["bits=wmxfp4_afp8_block", "bits.weight.rule=even"],
    ["bits=fp8", "protocol.guidance=1.0", "generate.dtype=float32", "model.revision=main"],
    ["model=tiny-t2i", 'protocol.prompts="/tmp/it\'s mine.txt"', "model.lora={path: a b, scale: 0.5}"],
]


def recorded(overrides):
    (config,) = composed([overrides])
    return Record("0" * 12, "ok", config, config["method"]["name"], config["model"]["name"], config["name"])


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_the_command_composes_what_was_recorded(overrides):
    record = recorded([*overrides, "tracker=none"])
    program, verb, *words = shlex.split(command_of(record))
    assert (program, verb) == ("ditbench", "run")
    assert composed([words]) == [record.config]


def test_what_the_files_say_anyway_is_not_repeated():
    record = recorded(["tracker=none", "method=quarot", "bits=w4a4", "protocol.steps=4"])
    assert (
        command_of(record)
        == "ditbench run model=tiny-dit method=quarot bits=w4a4 metrics=judge protocol.steps=4 tracker=none"
    )


def test_what_the_name_of_a_format_says_is_not_repeated():
    record = recorded(["tracker=none", "method=rtn", "bits=wnvfp4_amxfp8", "bits.act.rule=floor"])
    assert (
        command_of(record)
        == "ditbench run model=tiny-dit method=rtn bits=wnvfp4_amxfp8 metrics=judge bits.act.rule=floor tracker=none"
    )


def test_a_record_of_before_with_little_in_its_configuration_has_a_command_too():
    record = Record("0" * 12, "failed", {"bits": {"label": "w4a8"}, "seed": 3}, "gone", "lost", "default")
    assert command_of(record) == "ditbench run model=lost method=gone bits=w4a8 seed=3"
