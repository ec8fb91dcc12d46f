"""Every file of conf/model/ composes into a run, and says where its weights come from."""

from __future__ import annotations

import re
import sys

import diffusers
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from ditbench.harness.common.paths import CONF
from ditbench.harness.models.base import RESCALED, ModelSpec
from ditbench.harness.models.known_families import family
from ditbench.harness.samples.conditions import PROMPTS
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.sweep import compose
from ditbench.harness.zoo import trainable

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if not path.stem.startswith("_"))


def composed(name: str) -> RunConfig:
    """With prompts that need no download, and as the run has it."""
    compose.register()
    prompts = ("protocol.prompts=shapes", "calibration.prompts=shapes-calibration")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra_compose("config", overrides=[f"model={name}", *prompts])
    return parse(OmegaConf.to_container(config, resolve=True))


def comments(name: str) -> str:
    """Of a model's file and of the files that it is based on."""
    text = (CONF / "model" / f"{name}.yaml").read_text()
    bases = re.findall(r"^defaults: *\[([\w.-]+),", text, re.MULTILINE)
    return "\n".join([*re.findall("#.*", text), *map(comments, bases)])


def says_where_its_weights_come_from(spec: ModelSpec, said: str) -> bool:
    if spec.random is not None or (spec.source or "").startswith("zoo:"):
        return spec.revision is None
    pinned = re.fullmatch("[0-9a-f]{40}", spec.revision or "") is not None
    return (spec.source or "").count("/") == 1 and (pinned or (spec.revision == "main" and "not pinned" in said))


@pytest.mark.parametrize("name", NAMES)
def test_a_models_file_composes_into_a_run(name):
    config = composed(name)  # checks sampler, metrics and every number
    adapter = family(config.model.family)
    assert config.model.name == name
    assert config.protocol.sampler.steps >= 2 and config.protocol.n >= 1
    assert says_where_its_weights_come_from(config.model, comments(name))
    if adapter.CONDITION == PROMPTS:
        assert {"prompts", "calibration_prompts"} <= set(config.section("model")["usual"])
        for class_name in (*adapter.pipelines, adapter.transformer):
            ours = [
                module
                for name, module in sys.modules.items()
                if name.startswith("ditbench.harness.models.families.opensora")
            ]
            assert any(hasattr(module, class_name) for module in (diffusers, *ours))
    if (config.model.source or "").startswith("zoo:"):
        assert config.model.source.removeprefix("zoo:") in trainable()


def test_a_models_own_negative_prompt_is_what_it_is_guided_away_from():
    told = {
        name: composed(name).protocol.sampler.negative_prompt
        for name in ("chroma1-hd", "ltx-2", "qwen-image", "tiny-dit")
    }
    assert told["chroma1-hd"].startswith("low quality, ugly") and told["ltx-2"].endswith("transition, static.")
    assert told["qwen-image"] is told["tiny-dit"] is None


def test_a_revision_is_a_commit_or_said_not_to_be_pinned():
    hub = {"source": "owner/name", "revision": "0123456789abcdef0123456789abcdef01234567"}
    assert says_where_its_weights_come_from(ModelSpec("a", "dit", **hub), "")
    assert not says_where_its_weights_come_from(ModelSpec("a", "dit", **hub | {"revision": "main"}), "# nothing")
    assert not says_where_its_weights_come_from(ModelSpec("a", "dit", **hub | {"revision": None}), "# not pinned")
    assert not says_where_its_weights_come_from(ModelSpec("a", "dit", **hub | {"source": "name"}), "# not pinned")


def test_files_that_others_are_based_on_are_no_choice():
    assert {"_t2i", "_t2v"} <= {path.stem for path in (CONF / "model").glob("_*.yaml")}
    assert compose.groups()["model"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_outliers_says_how_they_came_and_which_model_has_none(name):
    spec = composed(name).model
    if spec.stress:
        assert spec.outliers is not None and spec.outliers["kind"] == RESCALED
    if spec.outliers:
        twin = composed(spec.outliers["unstressed"]).model
        assert twin.outliers is None and twin.stress is None
        assert (twin.family, twin.size) == (spec.family, spec.size)
        assert (spec.source == twin.source) == (spec.outliers["kind"] == RESCALED)
