"""`run_id` changes with everything that can change a number and with nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.common.paths import CONF
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.identity import identity
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.prompt_sets import load_prompts
from ditbench.harness.sweep import compose

BASE = ("method=smoothquant", "bits=w4a8")


def run_id(*overrides: str, parts: dict[str, str] | None = None) -> str:
    compose.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", overrides=[*BASE, *overrides])
    config = parse(OmegaConf.to_container(composed, resolve=True))
    model = model_of(config.model)
    return canonical_sha256(identity(config, model if parts is None else replace(model, parts=parts)))[:12]


CHANGES = [
    "method=rtn",
    "method.strength=0.6",
    "bits=w4a4",
    "bits=fp8",
    "bits.weight.symmetric=false",
    "model=tiny-dit-stress",
    "seed=1",
    "protocol.n=8",
    "protocol.steps=3",
    "protocol.guidance=2.0",
    "protocol.sampler=ddpm",
    "protocol.skip=[proj]",
    "calibration.n=8",
    "calibration.select=salient",
    "generate.dtype=float32",
    "generate.batch_size=3",
    "metrics=fidelity",
    "metrics.resamples=5",
    "measure.repeats=5",
    "backend=simulate",
]
KEEPS = [
    "results_dir=/elsewhere",
    "cache_dir=/elsewhere",
    "name=other",
    "tracker=none",
    "tracker.project=x",
    "force=true",
    "strict=true",
    "debug=true",
]


@pytest.fixture(scope="module")
def base() -> str:
    return run_id()


@pytest.mark.parametrize("override", CHANGES)
def test_what_can_change_a_number_changes_the_run_id(base, override):
    assert run_id(override) != base


@pytest.mark.parametrize("override", KEEPS)
def test_where_results_go_and_who_is_told_does_not_change_the_run_id(base, override):
    assert run_id(override) == base


def test_a_default_said_aloud_does_not_change_the_run_id(base):
    assert run_id("method.strength=0.5", "seed=0", "device=cpu" if not _cuda() else "device=cuda") == base


def test_the_float_model_is_one_run_whatever_bits_a_sweep_is_at():
    assert (
        len({run_id("method=fp", f"bits={label}") for label in ("w8a8", "w4a16", "fp8", "nvfp4", "wfp8_block_amxfp8")})
        == 1
    )


def test_an_edited_method_makes_new_runs(base, monkeypatch, tmp_path):
    (source,) = registry.source_files(registry.method("smoothquant"))
    edited = tmp_path / source.name
    edited.write_text(source.read_text() + "# edited")
    monkeypatch.setattr(registry, "source_files", lambda module: [edited])
    assert run_id() != base


def test_other_weights_under_the_same_name_make_new_runs(base):
    parts = model_of(ModelSpec("tiny-dit", "dit", source="zoo:tiny-dit")).parts
    assert run_id(parts=parts) == base
    assert run_id(parts=parts | {"transformer": "0" * 64}) != base


def test_how_the_place_of_a_model_or_of_prompts_is_spelled_does_not_change_the_run_id(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS / "tiny-t2i", tmp_path / "x")
    (tmp_path / "prompts.txt").write_text("a red circle")
    monkeypatch.chdir(tmp_path)
    ids = {
        run_id("model=tiny-t2i", f"model.source={start}x", f"protocol.prompts={start}prompts.txt")
        for start in ("", "./", f"{tmp_path}/")
    }
    assert len(ids) == 1


@pytest.mark.parametrize("of", ["protocol", "calibration"])
def test_an_edited_prompt_file_makes_new_runs(tmp_path, of):
    """The configuration holds its name only."""
    prompts = tmp_path / "prompts.jsonl"
    ids = set()
    for line in ('{"prompt": "a red circle"}', '{"prompt": "a red disc"}', '{"prompt": "a red disc", "tag": "colors"}'):
        prompts.write_text(line)
        load_prompts.cache_clear()
        ids.add(run_id("model=tiny-t2i", f"{of}.prompts={prompts}"))
    assert len(ids) == 3


def test_all_runs_of_these_changes_are_different_from_each_other():
    assert len({run_id(override) for override in CHANGES}) == len(CHANGES)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
