"""An OpenVINO model in the place of a transformer: called with its arguments, loaded from an export into a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.export import architecture
from ditbench.harness.build.flat_calls import leaves
from ditbench.harness.common.artifacts import Damaged, check, read_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.extras import needed

FORMAT, VERSION = "ditbench OpenVINO model", 1
MODEL, WEIGHTS, RECIPE = "model.xml", "model.bin", "recipe.json"
ROUNDS_BY_ITSELF = (
    "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # channels of an activation that OpenVINO gives a scale; 0: it rounds nothing
)


class Runner:
    """An OpenVINO model, compiled for the CPU.

    model: a file, or an `openvino.Model`. precision: "f32" or "bf16", of what is not int8. threads: None as OpenVINO chooses. options:
        of OpenVINO beside these.
    """

    def __init__(
        self, model: Any, *, precision: str, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        openvino = needed("openvino", "openvino", "OpenVINO")
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", **(options or {})}
        settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.dtypes = {port.any_name: port.element_type.to_dtype() for port in self.compiled.inputs}

    def __call__(self, arguments: dict[str, Any]) -> Tensor:
        """arguments: of the transformer → its prediction, float32."""
        return torch.from_numpy(self.compiled(self.given(arguments))[0].copy())

    def given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the model wants them."""
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor)
            .cpu()
            .numpy()
            .astype(self.dtypes[name], copy=False)
            for name, tensor in leaves(arguments)
            if name in self.dtypes
        }


class OpenVINOTransformer(nn.Module):
    """Stands in a diffusers pipeline for the transformer that an OpenVINO model was made of."""

    def __init__(self, run: Runner, original: nn.Module) -> None:
        super().__init__()
        self.run, self.config, self.dtype = run, original.config, torch.float32
        self.device = torch.device("cpu")
        self._signature = signature(original.forward)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        y = self.run(dict(self._signature.bind(*args, **kwargs).arguments))
        return Transformer2DModelOutput(sample=y) if return_dict else (y,)

    def cache_context(self, name: str, **more: Any) -> AbstractContextManager[None]:
        """As diffusers' models have it: pipelines call them inside; this one caches nothing."""
        return nullcontext()


def load_openvino(
    folder: str | Path, pipeline: Any, *, precision: str = "bf16", threads: int | None = None
) -> nn.Module:
    """The transformer of an OpenVINO export, which the pipeline gets in place of its own. Text encoders, VAE and scheduler stay.

    precision: "f32" or "bf16", of what is not int8.

    Raises:
        UserError: no such export, damaged, or of another model.
    """
    folder = Path(folder)
    try:
        described = read_manifest(folder / RECIPE)
        if described.get("format") != FORMAT or described.get("version") != VERSION:
            raise UserError(f"{folder / RECIPE}: not an OpenVINO export of this ditbench")
        for name, file in described["files"].items():
            check(folder / name, file)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no OpenVINO export: it has no {RECIPE}") from error
    except Damaged as damage:
        raise UserError(f"{damage}; copy it again, or export again") from damage
    ours, theirs = described["transformer"], architecture(pipeline.transformer)
    if ours["class"] != theirs["class"] or any(
        theirs["config"].get(key) != value for key, value in ours["config"].items()
    ):
        raise UserError(f"{folder} is an export of another {ours['class']} than this pipeline's {theirs['class']}")
    pipeline.transformer = OpenVINOTransformer(
        Runner(folder / MODEL, precision=precision, threads=threads), pipeline.transformer
    )
    return pipeline.transformer
