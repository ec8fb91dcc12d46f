"""Which families have an OpenVINO model: those that convert agree with `simulate`, the others are refused by name; the docs have both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generic_pipelines import GENERIC, GENERIC_SIZES
from newer_pipelines import NEWER, NEWER_SIZES, family_of
from small_models import around
from small_pipelines import SIZES, SMALL, wan_of_two_experts

from ditbench.harness.bench.engines.openvino import static_int8
from ditbench.harness.build.openvino_export import save_openvino
from ditbench.harness.build.openvino_run import load_openvino
from ditbench.harness.build.openvino_transformers import REFUSED
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.extras import installed
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.experts import experts_in
from ditbench.harness.quant.recipe import ModelRecipe

needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="the extra ditbench[openvino] is not installed")
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
MADE = GENERIC | SMALL | NEWER | {"wan2.2": wan_of_two_experts}
ALL_SIZES = GENERIC_SIZES | SIZES | NEWER_SIZES | {"wan2.2": SIZES["wan"]}
FAMILY = {"wan2.2": "wan", **dict.fromkeys(("allegro", "aura_flow", "mochi", "cogview4"), "generic")}
CONVERTS = {  # name of a small pipeline: class
    "sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel", "pixart": "PixArtTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel", "sana": "SanaTransformer2DModel", "hunyuan_dit": "HunyuanDiT2DModel",
    "wan": "WanTransformer3DModel", "cogvideox": "CogVideoXTransformer3DModel", "ltx": "LTXVideoTransformer3DModel",
    "latte": "LatteTransformer3DModel", "sana_video": "SanaVideoTransformer3DModel", "kandinsky5": "Kandinsky5Transformer3DModel",
    "opensora": "STDiT3", "aura_flow": "AuraFlowTransformer2DModel", "cogview4": "CogView4Transformer2DModel",
}  # fmt: skip
DRAWS = ("wan", "sd3")  # with its pipeline, guided: two calls, and one of twice the rows
REFUSES = {
    "z_image": "ZImageTransformer2DModel", "hidream": "HiDreamImageTransformer2DModel", "chroma": "ChromaTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel", "hunyuan_video": "HunyuanVideoTransformer3DModel",
    "hunyuan_video15": "HunyuanVideo15Transformer3DModel", "ltx2": "LTX2VideoTransformer3DModel",
    "allegro": "AllegroTransformer3DModel", "mochi": "MochiTransformer3DModel", "wan2.2": "Experts",
}  # fmt: skip


def small(name: str) -> LoadedModel:
    torch.manual_seed(0)
    return around(MADE[name](), name, FAMILY.get(name, family_of(name)), ALL_SIZES.get(name))


@needs_openvino
@pytest.mark.parametrize("name", sorted(CONVERTS))
def test_a_transformer_that_converts_computes_what_simulate_computes_at_two_numbers_of_rows(name, tmp_path):
    model = small(name)
    target, examples = model.target(), (model.step_inputs(2), model.step_inputs(3))
    assert type(target.transformer).__name__ == CONVERTS[name]
    work = SimpleNamespace(target=target, layers=tuple(target.layers), examples=examples)
    described = save_openvino(tmp_path / "out", target, static_int8(work), examples, about={})
    assert described["error_to_simulate"] < 1e-2  # codes on an edge, which fall the other way
    if name in DRAWS:
        load_openvino(tmp_path / "out", model.pipe, precision="f32")
        settings = model.adapter.settings(model.pipe, 4.0, 1)  # of the usual call, whose tokens are the export's
        drawn = model.pipe("a cross", num_inference_steps=1, output_type="latent", **settings)
        assert isinstance(drawn[0], torch.Tensor) and drawn[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(REFUSES))
def test_a_transformer_that_does_not_is_refused_by_name_with_the_reason(name, tmp_path):
    model = SimpleNamespace(transformer=type(REFUSES[name], (), {})())
    with pytest.raises(UserError, match=f"no OpenVINO model of a {REFUSES[name]}: ") as told:
        save_openvino(tmp_path / "out", model, ModelRecipe(layers={}), ({}, {}), about={})
    assert str(told.value).endswith(REFUSED[REFUSES[name]]) and "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_the_refused_are_classes_that_families_have():
    assert set(REFUSES.values()) == set(REFUSED) and set(REFUSES) | set(CONVERTS) <= set(MADE)
    for name, kind in REFUSES.items():
        found = experts_in(MADE[name]()) if name == "wan2.2" else MADE[name]().transformer
        assert type(found).__name__ == kind


def test_the_docs_have_every_family_and_the_reason():
    _, _, after = DOCS.read_text().partition("<!-- OpenVINO families -->\n")
    assert after.split("<!-- end -->")[0] == table()


def table() -> str:
    """PYTHONPATH=src:tests:tests/build python -c 'import test_openvino_families as t; print(t.table())'."""
    rows = ["| pipelines of | class | OpenVINO model |", "| --- | --- | --- |"]
    names = {"DiTTransformer2DModel": "dit"} | {kind: name for name, kind in CONVERTS.items()}
    rows += [f"| {name} | `{kind}` | converts |" for kind, name in sorted(names.items(), key=lambda item: item[1])]
    rows += [f"| {name} | `{kind}` | refused: {REFUSED[kind]} |" for name, kind in sorted(REFUSES.items())]
    return "\n".join(rows) + "\n"
