"""Rows that somebody else quantized: checkpoints are made here with each library that is installed, and drawn with in the protocol."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import edit, load
from layers_of_others import of_bitsandbytes
from safetensors.torch import load_file, save_file
from torch import nn

from ditbench.harness.cli.export import export_run
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.plain_tensors import held_bytes, plain_tensors
from ditbench.harness.measurement.stored import IN_FLOAT, StoredLayer, label_of
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.table import table
from ditbench.harness.run import run
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.external import loaded
from ditbench.harness.stages.identity import run_id
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.sweep.compose import composed

LAYER = "transformer_blocks.0.attn.to_q"  # 32 × 32


def configuration(flux: Path, results: Path, *more: str) -> RunConfig:
    (raw,) = composed([[
        "model=flux.1-dev", f"model.source={flux}", "model.revision=null", "model.size={height:16,width:16}",
        "model.dtype=float32", "protocol.n=2", "protocol.steps=2", "protocol.prompts=shapes", "calibration.n=2",
        "calibration.prompts=shapes-calibration", "generate.noise_floor_seeds=0", "generate.dtype=float32", "generate.reference_dtype=float32",
        "metrics.names=[psnr,sqnr]", "metrics.resamples=5", "measure.samples=1", "measure.repeats=1", "measure.warmup=0",
        "tracker=none", "device=cpu", f"results_dir={results}", *more,
    ]])  # fmt: skip
    return parse(raw)


def external(folders, results: Path, place: Path, *more: str) -> RunConfig:
    return configuration(folders["flux"], results, "method=external", f"method.path={place}", *more)


def by_torchao(folders, place: Path, config) -> Path:
    import diffusers

    quantizer = diffusers.TorchAoConfig(config)
    folder = folders["flux"] / "transformer"
    made = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=quantizer, torch_dtype=torch.bfloat16
    )
    made.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def int8(folders, tmp_path_factory) -> Path:
    """torchao's weight-only int8 of the small flux."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return by_torchao(folders, tmp_path_factory.mktemp("torchao") / "int8", quantization.Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def done(folders, int8, tmp_path_factory) -> Record:
    return run(external(folders, tmp_path_factory.mktemp("results"), int8))


def test_a_checkpoint_of_torchao_is_a_row_whose_label_and_bits_are_read_from_its_tensors(done, folders):
    assert done.status == "ok", done.error
    assert done.bits["label"] == "int8 (torchao)"
    ours = load(folders["flux"]).transformer
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    # int8 codes; a float32 scale and an int8 zero point of each row
    expected = {name: each.weight.numel() + 5 * each.out_features for name, each in linears.items()}
    count = sum(each.weight.numel() for each in linears.values())
    assert not done.bits["float_layers"]
    assert done.bits["weight_bits_effective"] == pytest.approx(8 * sum(expected.values()) / count)
    assert done.bits["act_bits_effective"] == 16 and done.bits["mac_share_quantized"] == 0
    rest = sum(p.numel() for p in ours.parameters()) - count
    assert done.efficiency["model_bytes"] == sum(expected.values()) + 2 * rest


def test_it_is_drawn_with_the_noise_of_the_float_model_and_timed_as_it_runs(done):
    """Other noise would be at 10 dB, the float model itself at infinity."""
    assert 30 < done.metrics["psnr"]["value"] < 90
    assert done.efficiency["kind"] == "measured" and done.efficiency["backend"] == "torchao"
    assert done.efficiency["latency_ms"]["median"] > 0 and done.efficiency["speedup"] > 0


def test_what_quantizing_took_and_a_layer_s_error_are_not_known(done):
    assert done.cost["fit_s"] is None and not done.layers
    assert "parity" not in done.efficiency and "recording" not in done.made_from


def test_the_report_has_it_among_the_others(done, folders, tmp_path):
    ours = run(configuration(folders["flux"], tmp_path, "method=rtn", "bits=w8a8"))
    (group,) = compare.groups([done, ours])
    rows = {row.cells[0].text: [cell.text for cell in row.cells] for row in table(group, ["psnr"]).rows}
    assert rows["external"][1] == "int8 (torchao)" and rows["rtn"][1] == "W8A8"


def test_it_is_the_same_run_wherever_its_files_lie_and_another_one_if_they_change(folders, int8, tmp_path):
    copied = Path(shutil.copytree(int8, tmp_path / "elsewhere"))
    one, other = external(folders, tmp_path, int8), external(folders, tmp_path, copied)
    model = model_of(one.model)
    assert run_id(one, model) == run_id(other, model)
    edit(copied / "config.json", a_note="changed")
    assert run_id(one, model) != run_id(other, model)


def test_bits_of_a_sweep_make_no_other_row_of_it(folders, int8, tmp_path):
    configs = [external(folders, tmp_path, int8, f"bits={bits}") for bits in ("w8a8", "w4a4", "nvfp4")]
    assert len({run_id(config, model_of(config.model)) for config in configs}) == 1
    assert parse(json.loads(json.dumps(configs[0].raw))).raw == configs[0].raw


def test_activations_that_its_tensors_quantize_are_counted(folders, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    place = by_torchao(folders, tmp_path / "w8a8", quantization.Int8DynamicActivationInt8WeightConfig())
    found = run(external(folders, tmp_path, place))
    assert found.status == "ok", found.error
    assert found.bits["label"] == "W int8 A int8 (torchao)" and found.bits["act_bits_effective"] == 8
    assert 0.5 < found.bits["mac_share_quantized"] == found.bits["mac_share_weight_quantized"] < 1


def test_a_checkpoint_of_quanto_is_a_row(folders, tmp_path):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    import diffusers

    made = diffusers.FluxTransformer2DModel.from_pretrained(
        folders["flux"] / "transformer", quantization_config=diffusers.QuantoConfig(weights_dtype="int8")
    )
    made.save_pretrained(tmp_path / "quanto")
    found = run(external(folders, tmp_path, tmp_path / "quanto"))
    assert found.status == "ok", found.error
    assert found.bits["label"] == "int8 (quanto)" and 8 < found.bits["weight_bits_effective"] < 11
    assert found.bits["act_bits_effective"] == 16


def test_a_gguf_file_is_a_row_named_by_its_own_formats(folders, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(tmp_path / "small.gguf"), "flux")
    for name, tensor in load(folders["flux"]).transformer.state_dict().items():
        values = tensor.float().numpy()
        if name.startswith(("transformer_blocks.", "single_")) and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = run(external(folders, tmp_path, tmp_path / "small.gguf"))
    assert found.status == "ok", found.error
    assert found.bits["label"] == "Q8_0 (gguf)"
    assert found.bits["weight_bits_quantized_layers"] == 8.5  # 32 codes and a float16 scale
    assert "x_embedder" in found.bits["float_layers"]


def test_a_checkpoint_of_sdnq_is_a_row(folders, tmp_path):
    sdnq = pytest.importorskip("sdnq", reason="sdnq is not installed")
    import diffusers

    quantizer = sdnq.SDNQConfig(weights_dtype="int8", minimum_allowed_numel=1, modules_to_not_convert=["x_embedder"])
    made = diffusers.FluxTransformer2DModel.from_pretrained(
        folders["flux"] / "transformer", quantization_config=quantizer, torch_dtype=torch.float32
    )
    made.save_pretrained(tmp_path / "sdnq")
    found = run(external(folders, tmp_path, tmp_path / "sdnq"))
    assert found.status == "ok", found.error
    assert found.bits["label"] == "int8 (sdnq)" and "x_embedder" in found.bits["float_layers"]
    assert 8 < found.bits["weight_bits_quantized_layers"] < 11
    assert found.bits["act_bits_effective"] is None  # its tensors do not say


@pytest.mark.parametrize(("bits", "label", "act"), [(4, "nf4 (bitsandbytes)", 16), (8, "int8 (bitsandbytes)", None)])
def test_a_checkpoint_of_bitsandbytes_is_a_row_on_a_cpu_too(folders, tmp_path, bits, label, act):
    """diffusers makes none without a GPU; the layers are bitsandbytes' own, under the names that diffusers saves."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import diffusers

    made = diffusers.FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer")
    for block in made.transformer_blocks:  # as wide as one of bitsandbytes' blocks of 64 at least
        block.ff.net[2] = of_bitsandbytes(block.ff.net[2], bits)
    skipped = [name for name, module in made.named_modules() if type(module) is nn.Linear]
    made.register_to_config(quantization_config=diffusers.BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped,
    ))  # fmt: skip
    made.save_pretrained(tmp_path / "made")
    asks = diffusers.quantizers.bitsandbytes.BnB4BitDiffusersQuantizer.validate_environment
    found = run(external(folders, tmp_path, tmp_path / "made"))
    assert found.status == "ok", found.error
    assert found.bits["label"] == label and found.bits["act_bits_effective"] == act
    in_float = set(found.bits["float_layers"])
    assert LAYER in in_float and "transformer_blocks.0.ff.net.2" not in in_float
    assert 20 < found.metrics["psnr"]["value"] < 90
    assert diffusers.quantizers.bitsandbytes.BnB4BitDiffusersQuantizer.validate_environment is asks


def test_what_has_no_recipe_is_not_exported(folders, done, tmp_path):
    with pytest.raises(UserError, match="it has no recipe"):
        export_run(done, tmp_path / "x")


def test_what_would_end_the_process_is_refused(folders, tmp_path):
    """optimum-quanto 0.2.7: its int8 product in bfloat16 is a segmentation fault of torch's CPU kernel."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    config = altered(folders, tmp_path, quantization_config={"quant_method": "quanto", "weights_dtype": "int8"})
    model = model_of(config.model)
    with pytest.raises(UserError, match="set generate.dtype=float32"):
        loaded(replace(config, raw=config.raw | {"generate": config.raw["generate"] | {"dtype": "bfloat16"}}), model)


@pytest.mark.parametrize(
    "place, words",
    [
        ("/nowhere/at/all", "no such folder or file"),
        ("", "needs method.path="),
        ("''", "needs method.path="),
        ("{flux}/vae", "the model has a FluxTransformer2DModel"),
    ],
)
def test_what_cannot_be_a_row_is_refused_in_a_line(place, words, folders, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        config = external(folders, tmp_path, place.format(**folders) or "null")
        loaded(config, model_of(config.model))
    assert "\n" not in str(error.value)


def altered(folders, tmp_path, **values) -> RunConfig:
    folder = Path(shutil.copytree(folders["flux"] / "transformer", tmp_path / "altered"))
    edit(folder / "config.json", **values)
    return external(folders, tmp_path, folder)


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"quantization_config": {"quant_method": "nosuchlibrary"}},
            "nosuchlibrary, which is not installed; pip install",
        ),
        ({"axes_dims_rope": [8, 4, 4]}, r"has axes_dims_rope=\[8, 4, 4\], the model has"),
        ({"num_layers": 3}, "no weights for"),
        ({"quantization_config": "torchao"}, "quantization_config must be an object with quant_method.*got 'torchao'"),
        ({"quantization_config": {"quant_method": ["torchao", 1]}}, "quantization_config must be an object"),
        ({"_class_name": None}, "has no _class_name in its config.json, the model has a FluxTransformer2DModel"),
    ],
)
def test_another_architecture_or_a_library_that_is_missing_is_refused_in_a_line(values, words, folders, tmp_path):
    config = altered(folders, tmp_path, **values)
    with pytest.raises(UserError, match=words) as error:
        loaded(config, model_of(config.model))
    assert "\n" not in str(error.value)


def test_weights_that_its_configuration_leaves_out_are_refused(folders, tmp_path):
    """A configuration that skips layers which are quantized in the files: their scales would be left out, their codes taken for weights."""
    config = altered(folders, tmp_path)
    (file,) = (tmp_path / "altered").glob("*.safetensors")
    scale = {"transformer_blocks.0.attn.to_q.SCB": torch.ones(4)}
    save_file(load_file(file) | scale, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not know \(transformer_blocks.0.attn.to_q.SCB, 1 in all\)"):
        loaded(config, model_of(config.model))


def test_weights_that_somebody_rounded_and_stores_in_float_are_said_to_be_float(folders, tmp_path):
    found = run(altered(folders, tmp_path))
    assert found.status == "ok", found.error
    assert found.bits["label"] == IN_FLOAT and found.bits["weight_bits_effective"] == 16
    assert found.efficiency["compression"] == 1


def test_labels_name_the_commonest_format_first_and_activations_where_they_are_known():
    layers = [StoredLayer("Q4_K", IN_FLOAT, 1), StoredLayer("Q8_0", IN_FLOAT, 1), StoredLayer("Q4_K", IN_FLOAT, 1)]
    assert label_of(layers, "gguf") == "Q4_K/Q8_0 (gguf)"
    assert label_of([StoredLayer("int8", None, 1)], "other") == "int8 (other)"


def test_a_plain_tensor_holds_itself():
    x = torch.zeros(3, dtype=torch.bfloat16)
    assert plain_tensors(x) == [x] and held_bytes(x) == 6
