"""The forms that methods come in: what each sets, what is stronger, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.calibration.recording import without_data
from ditbench.harness.cli.doctor import examine
from ditbench.harness.cli.list import list_bits, list_methods
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.forms import DEFAULT, PUBLISHED, Form
from ditbench.harness.papers import reported
from ditbench.harness.papers.reproduce.rows import plan_lines
from ditbench.harness.records.record import Record
from ditbench.harness.report.compare import run_names
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep.compose import composed

METHODS = list(registry.known_methods())


def configured(*overrides: str) -> dict:
    (config,) = composed([["model=tiny-dit", "bits=w4a8", *overrides]])
    parse(config)
    return config


def test_every_method_has_a_published_form_and_each_form_composes_to_what_it_says():
    jobs = [(name, form) for name in METHODS for form in registry.forms_of(name)]
    configs = composed([[f"method={name}", f"method.form={form}", "bits=w4a8"] for name, form in jobs])
    assert all(list(registry.forms_of(name))[:2] == [DEFAULT, PUBLISHED] for name in METHODS)
    for (name, form), config in zip(jobs, configs, strict=True):
        wanted = registry.forms_of(name)[form]
        expected = registry.defaults(name) | {"form": form} | dict(wanted.params)
        assert registry.params_of(config["method"]) == registry.params_of(expected), (name, form)
        for setting, value in wanted.settings.items():
            section, *path = setting.split(".")
            found = config[section]
            for key in path:
                found = found[key]
            assert found == value, (name, form, setting)


def test_where_no_form_says_anything_bits_and_calibration_are_as_before():
    config = configured("method=rtn")
    assert config["calibration"]["n"] == 32
    assert config["bits"]["weight"] == {
        "bits": 4, "number": "int", "granularity": "per_channel", "group_size": None, "symmetric": True,
    }  # fmt: skip
    assert config["bits"]["act"] == {
        "bits": 8, "number": "int", "granularity": "per_token", "group_size": None, "symmetric": True, "dynamic": True,
    }  # fmt: skip


def test_what_is_set_by_hand_is_stronger_than_a_form_also_where_it_is_the_default():
    config = configured(
        "method=ptq4dit", "method.form=published", "method.iterations=100", "bits.weight.symmetric=true",
        "calibration.n=5",
    )  # fmt: skip
    assert (config["method"]["iterations"], config["method"]["learning_rate"]) == (100, 1e-3)
    assert config["bits"]["weight"]["symmetric"] and not config["bits"]["act"]["dynamic"]
    assert config["calibration"]["n"] == 5
    config = configured("method=svdquant", "method.form=published", "protocol=ptq4dit")
    assert config["bits"]["act"]["granularity"] == "per_tensor"  # a protocol says what is equal between methods


def test_a_record_says_the_form_and_what_it_sets():
    config = configured("method=duquant", "method.form=published")
    assert config["method"]["form"] == "published" and config["method"]["weight_clip"] == 0.8
    assert configured("method=duquant")["method"]["form"] == "default"


def test_a_misspelt_form_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="no form of method clq 'publishd'; did you mean 'published'"):
        configured("method=clq", "method.form=publishd")


def test_a_record_from_before_there_were_forms_still_says_its_parameters():
    old = {name: value for name, value in registry.defaults("htg").items() if name != "form"}
    assert registry.params_of(old) == registry.method("htg").Params()


@dataclass(frozen=True)
class Params:
    strength: float = 0.5


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        ({"published": Form({"strenght": 1.0})}, "FORMS\\['published'\\] is no Form of its Params"),
        ({"published": {"strength": 1.0}}, "FORMS\\['published'\\] is no Form of its Params"),
    ],
)
def test_a_form_that_its_params_do_not_have_is_refused(forms, words):
    module = SimpleNamespace(Params=Params, fit=print, apply=print, FORMS=forms)
    with pytest.raises(UserError, match=words):
        registry._check_shape(module)
    registry._check_shape(SimpleNamespace(Params=Params, fit=print, apply=print, FORMS={"published": Form()}))


def test_a_form_leaves_alone_what_has_to_be_equal_between_methods():
    with pytest.raises(ValueError, match="a form sets bits and calibration, not protocol.steps"):
        Form(settings={"protocol.steps": 100})


def test_list_and_doctor_name_the_forms(tmp_path):
    text = list_methods()
    assert "default, published, joint" in text
    line = next(line for line in text.splitlines() if line.split()[:2] == ["duquant", "published"])
    assert "method.weight_clip=0.8" in line and "bits.weight.symmetric=false" in line
    assert "symmetric=true, dynamic=true" in list_bits() and "form:" not in list_bits()
    assert re.search("default, published, joint +ptqd", examine(tmp_path))


def test_a_reproduction_runs_the_published_form_unless_another_is_asked_for():
    table = reported.table("ptq4dit-table1")
    for overrides, form in (((), "published"), (("method.form=default",), "default")):
        jobs = [line.job for line in plan_lines(table, table.reproduce, None, overrides) if line.job]
        assert jobs and all(f"method.form={form}" in job for job in jobs)


def named(*configs: dict) -> list[str]:
    """Names of runs of these configurations, with nothing measured."""
    records = [Record("id", "ok", c, c["method"]["name"], c["model"]["name"], c["name"]) for c in configs]
    return run_names(records)


def test_a_runs_name_is_its_form_and_what_was_set_beside_it():
    one, other = configured("method=ptq4dit"), configured("method=ptq4dit", "method.form=published")
    assert named(one, other) == ["ptq4dit form=default", "ptq4dit form=published"]
    short = configured("method=ptq4dit", "method.form=published", "method.iterations=7")
    assert named(one, other, short)[2] == "ptq4dit form=published iterations=7"
    parts = [configured("method=htg", f"method.parts={parts}") for parts in ("group", "group+shift")]
    assert named(*parts) == ["htg parts=group", "htg parts=group+shift"]


WITHOUT_DATA = {  # method: parameters with which weights alone decide
    "rtn": {},
    "quarot": {},
    "vidit_q": {"scale": False},
    "svdquant": dict(registry.forms_of("svdquant")["data_free"].params),
    "convrot": {},
    "dvd_quant": {},
    "lrq_dit": {"parts": "tlq"},
    "q_dit": {"weights": "rtn"},
    "fp": {},
}


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_a_method_that_weights_alone_decide_runs_without_data(name, small_target, small_calibration):
    module = registry.method(name)
    params = module.Params(**WITHOUT_DATA[name])
    nothing = without_data(small_calibration, f"method {name}")
    states = [module.fit(small_target, each, DYNAMIC, params) for each in (nothing, small_calibration)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    module.apply(small_target, states[0], DYNAMIC, params)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("rtn", "fp", "quarot", "convrot", "dvd_quant")])
def test_a_method_that_needs_data_says_so_without_them(name, small_target, small_calibration):
    module = registry.method(name)
    nothing = without_data(small_calibration, f"method {name}")
    with pytest.raises(UserError, match=f"^method {name} looks at what layers read, and calibration.n=0"):
        select = getattr(module, "select_calibration", lambda calibration, *_: calibration)
        module.fit(small_target, select(nothing, module.Params(), 0), DYNAMIC, module.Params())


def test_static_activations_need_data_whatever_the_method(small_target, small_calibration):
    rtn = registry.method("rtn")
    with pytest.raises(UserError, match="method rtn with static activations .* calibration.n=0"):
        who = "method rtn with static activations (bits.act.dynamic=false)"
        rtn.fit(small_target, without_data(small_calibration, who), STATIC, rtn.Params())


def test_statistics_that_are_cached_are_no_way_around_it(small_target, small_calibration):
    nothing = without_data(small_calibration, "method htg")
    assert nothing.num_steps == small_calibration.num_steps
    for read in (
        lambda: nothing.derived("statistics", "key", "title"),
        lambda: nothing.per_step,
        lambda: nothing.rows(0, 1),
        lambda: nothing.num_rows(0),
        lambda: nothing.num_batches(),
        lambda: list(nothing.batches()),
    ):
        with pytest.raises(UserError, match="method htg looks at what layers read"):
            read()


def test_params_of_a_form_are_params():
    for name in METHODS:
        for form in registry.forms_of(name).values():
            assert set(form.params) <= set(asdict(registry.method(name).Params()))
