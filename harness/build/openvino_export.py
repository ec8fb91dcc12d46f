"""A quantized transformer as an OpenVINO model, for CPUs: `model.xml`, `model.bin` and `recipe.json`.

What a recipe says is written in operators that OpenVINO knows: codes of weights as constants of 8 bits (or 4) that are converted, less
their zero points, times their scales; static activations of a tensor as FakeQuantize. OpenVINO's CPU plugin makes int8 products of the
two. Transforms, low-rank branches, folds and biases are the float operators that they are. What has no such form is refused
(`why_not`); the rest of the model is the float transformer, in float32, and runs in whatever precision OpenVINO is asked for.

    with activations (format "openvino"): the model is the one that `simulate` runs
    weights alone (format "openvino-weights"): the model that `simulate` runs without quantizers of activations; OpenVINO may round them
        by itself (ROUNDS_BY_ITSELF), which no record has measured
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditbench
from ditbench.harness.backends.few_rows import SteadyLinear
from ditbench.harness.backends.integers import uneven
from ditbench.harness.backends.simulate import SimulatedKernel
from ditbench.harness.build.build import build, set_submodule
from ditbench.harness.build.export import architecture
from ditbench.harness.build.flat_calls import FlatCall, leaves, output_of, relative_error
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.openvino_run import (
    FORMAT,
    MODEL,
    RECIPE,
    ROUNDS_BY_ITSELF,
    VERSION,
    WEIGHTS,
    Runner,
)
from ditbench.harness.build.openvino_transformers import refused
from ditbench.harness.common.artifacts import write_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.extras import needed
from ditbench.harness.common.files import atomic_path, file_sha256
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import INT, QuantSpec
from ditbench.harness.quant.target import Target

FAR = 0.1  # a relative error that no rounding explains: the model was written wrong
STATIC = "bits.act.dynamic=false bits.act.granularity=per_tensor"


def why_not(recipe: ModelRecipe, *, weights_only: bool = False) -> str | None:
    """Why OpenVINO has no form for this recipe, or None."""
    if recipe.variants:
        return "its layers change with the range of denoising steps, and an OpenVINO model has no clock"
    if recipe.num_steps is not None:
        return "it has tables by denoising step, and an OpenVINO model has no clock"
    if recipe.attention:
        return "it quantizes the operands of attention, which OpenVINO's fused attention does not take"
    for name, layer in recipe.layers.items():
        if why := _why_not(layer, weights_only):
            return f"{name}: {why}"
    return None


def _why_not(layer: LayerRecipe, weights_only: bool) -> str | None:
    if layer.weight is not None and not isinstance(layer.weight, QuantizedWeight):
        return "its weight is looked up in a table, and OpenVINO's codes are evenly spaced"
    if layer.weight is not None and (why := _not_integers(layer.weight.spec, "its weight is")):
        return why
    if layer.act is None or weights_only:
        return None
    return uneven("FakeQuantize", layer.act) or why_not_activations(layer.act.spec)


def why_not_activations(spec: QuantSpec) -> str | None:
    """Why OpenVINO has no form for activations that are so quantized, or None; known before anything is."""
    if why := _not_integers(spec, "its activations are"):
        return why
    if spec.dynamic:
        return (
            "its activations find their range in each call, and FakeQuantize has one that was found before; quantize with "
            f"{STATIC}, or take --format openvino-weights"
        )
    if spec.granularity != "per_tensor":
        return f"its activations have a range {spec.granularity}, and an int8 product takes one of the tensor; quantize with {STATIC}"
    return None


def _not_integers(spec: QuantSpec, subject: str) -> str | None:
    if spec.number == INT and not spec.in_blocks:
        return None
    return f"{subject} {spec.told}, for which OpenVINO's CPU has no product"


def without_activations(recipe: ModelRecipe) -> ModelRecipe:
    """The same weights; activations stay in float."""
    return replace(recipe, layers={name: replace(layer, act=None) for name, layer in recipe.layers.items()})


def save_openvino(
    folder: Path,
    target: Target,
    recipe: ModelRecipe,
    examples: tuple[dict[str, Any], dict[str, Any]],
    *,
    about: dict[str, Any],
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write the folder, which appears whole or not at all → what is in its recipe.json.

    examples: arguments of two calls of the transformer with different numbers of rows: sizes that differ may be any later, all others
        are fixed. The model is checked on both, in float32, against `simulate`.

    Raises:
        UserError: the folder exists, OpenVINO is not installed, it has no form for the recipe or for the transformer, or what it
            made of them computes something else.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; an export overwrites nothing, choose another --out")
    kind = type(target.transformer).__name__
    if why := refused(target.transformer):
        raise UserError(f"export --format openvino: no OpenVINO model of a {kind}: {why}")
    openvino = needed("openvino", "openvino", "export --format openvino")
    if why := why_not(recipe, weights_only=weights_only):
        raise UserError(f"export --format openvino: OpenVINO has no form for this recipe: {why}")
    recipe = without_activations(recipe) if weights_only else recipe
    simulated = build(target, recipe, dtype=torch.float32, backend="simulate")
    expected = [output_of(simulated(**example)) for example in examples]
    model = converted(simulated, examples)  # which rewrites it
    with atomic_path(folder) as part:
        part.mkdir()
        if not weights_only:  # else OpenVINO would round activations that the recipe leaves in float
            model.set_rt_info("0", ["runtime_options", ROUNDS_BY_ITSELF])
        openvino.save_model(model, part / MODEL, compress_to_fp16=False)
        run = Runner(part / MODEL, precision="f32", options={ROUNDS_BY_ITSELF: 0} if weights_only else None)
        try:
            errors = [relative_error(run(example), y) for example, y in zip(examples, expected, strict=True)]
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(f"export --format openvino: OpenVINO's model of a {kind} does not run: {line}") from error
        if max(errors) > FAR:
            raise UserError(
                f"export --format openvino: OpenVINO's model of a {kind} is {max(errors):.0%} off what "
                "simulate computes, so it was not kept"
            )
        described = {
            "format": FORMAT,
            "version": VERSION,
            "ditbench": ditbench.__version__,
            "openvino": openvino.__version__,
            "transformer": architecture(target.transformer),
            "inputs": {port.any_name: str(port.partial_shape) for port in model.inputs},
            "activations": "float" if weights_only else "as the recipe says",
            "error_to_simulate": max(errors),
            **about,
            "files": {
                name: {"bytes": (part / name).stat().st_size, "sha256": file_sha256(part / name)}
                for name in (MODEL, WEIGHTS)
            },
        }
        write_manifest(part / RECIPE, json.loads(json.dumps(described)))
    return described


def converted(model: nn.Module, examples: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    """A built model as an `openvino.Model`, whose inputs have the names of the transformer's arguments ("a.b" where they are
    nested). `model` is rewritten in place and of no use afterwards.

    Raises:
        UserError: OpenVINO has no form for what the transformer does.
    """
    openvino = needed("openvino", "openvino", "OpenVINO")
    expressible(model)
    first, second = (dict(leaves(example)) for example in examples)
    flat = FlatCall(model, examples[0], list(first))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's tracer, of every Python number that it takes for a constant
            made = openvino.convert_model(flat, example_input=tuple(first.values()))
    except Exception as error:  # whatever a converter stumbles over
        line = str(error).strip().split("\n")[0][:200]
        raise UserError(f"OpenVINO cannot convert a {type(model).__name__}: {type(error).__name__}: {line}") from error
    shapes = {}
    for port, name in zip(made.inputs, first, strict=True):
        port.get_tensor().set_names({name})
        sizes = zip(first[name].shape, second[name].shape, strict=True)
        shapes[port] = openvino.PartialShape([a if a == b else -1 for a, b in sizes])
    made.reshape(shapes)
    _pack_four_bits(made)
    made.validate_nodes_and_infer_types()
    return made


def expressible(model: nn.Module) -> None:
    """Put into the places of our layers, in place, some that consist of what OpenVINO has."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            set_submodule(model, name, ExpressedLinear(module))
        elif type(module) is SteadyLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # traced, it would have so many rows for ever


class ExpressedLinear(nn.Module):
    """A `QuantLinear` on the kernel of `simulate`: y = (x' rounded) · ((codes − zero points) · scales)ᵀ + low rank + bias, in float32."""

    codes_OGg: Tensor
    zero_point_OG1: Tensor | None
    scale_OG1: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        assert isinstance(layer.kernel, SimulatedKernel)
        self.transform, self.act, self.step = layer.transform, layer.kernel.act, layer.clock.step
        self.bias = layer.bias
        self.low_rank = (layer.down_rC, layer.up_Or) if layer.has_low_rank else None
        self.weight_OC = None if layer.kernel.quantized else layer.kernel.weight_OC
        if layer.kernel.quantized:
            weight = layer.kernel.quantized_weight()
            assert isinstance(weight, QuantizedWeight)
            groups = weight.scale_OG.shape[1]
            zero_point_OG = weight.zero_point_OG
            self.register_buffer("codes_OGg", weight.codes_OC.to(weight.spec.code_dtype).unflatten(1, (groups, -1)))
            self.register_buffer("zero_point_OG1", None if zero_point_OG is None else zero_point_OG[..., None])
            self.register_buffer("scale_OG1", weight.scale_OG[..., None])

    def weight(self) -> Tensor:
        """(O, C), float32."""
        if self.weight_OC is not None:
            return self.weight_OC
        if self.codes_OGg.shape[1] == 1:  # without an axis of groups: what OpenVINO's int8 product looks for
            codes, scale = self.codes_OGg[:, 0], self.scale_OG1[:, 0]
            zero_point = None if self.zero_point_OG1 is None else self.zero_point_OG1[:, 0]
        else:
            codes, scale, zero_point = self.codes_OGg, self.scale_OG1, self.zero_point_OG1
        values = codes.to(torch.float32)
        values = (values if zero_point is None else values - zero_point) * scale
        return values.flatten(1) if values.dim() == 3 else values

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = self.transform(x, self.step)
        y = F.linear(self.rounded(x), self.weight())
        if self.low_rank is not None:
            down_rC, up_Or = self.low_rank
            y = y + F.linear(F.linear(x, down_rC), up_Or)
        return y if self.bias is None else y + self.bias.at(self.step)

    def rounded(self, x: Tensor) -> Tensor:
        if self.act is None:
            return x
        assert self.act.scale is not None
        scale = float(self.act.scale.at(self.step))
        zero_point = 0 if self.act.zero_point is None else int(self.act.zero_point.at(self.step))
        least, most = int(self.act.spec.quant_min), int(self.act.spec.quant_max)
        if (
            most - least == 14
        ):  # 15 values OpenVINO would spread over 255 codes, which fall between; of 16 one stays unused
            x, least = x.clamp(least * scale, most * scale), least - 1
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, least, most)


def _pack_four_bits(model: Any) -> None:
    """Store codes that fit into four bits in as many, where no product of bytes reads them (it is of quantized activations)."""
    import numpy as np
    from openvino import Shape, Type
    from openvino import op as operators

    four = {"i8": (Type.i4, -8, 7), "u8": (Type.u4, 0, 15)}
    if any(each.get_type_name() == "FakeQuantize" for each in model.get_ops()):
        return
    for constant in [each for each in model.get_ops() if each.get_type_name() == "Constant"]:
        kind = constant.get_element_type().get_type_name()
        if kind not in four or constant.get_data().size % 2 or constant.get_data().ndim < 2:
            continue
        four_bits, least, most = four[kind]
        codes = np.array(constant.get_data())
        if codes.min() < least or codes.max() > most:
            continue
        packed = operators.Constant(four_bits, Shape(codes.shape), codes.flatten().tolist())
        packed.set_friendly_name(constant.get_friendly_name())
        for reader in constant.output(0).get_target_inputs():
            reader.replace_source_output(packed.output(0))
