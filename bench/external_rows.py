"""One small pipeline, and its transformer quantized by five other libraries: checkpoints for the table of docs/external.md.

    pip install 'ditbench[external]'
    PYTHONPATH=tests python bench/external_rows.py small-flux    # a folder for the pipeline and one for each checkpoint; prints the commands
    ditbench run -m …                                            # the two commands that it prints
    ditbench report --experiment external --format csv --out results/small-flux/external.csv
    python bench/docs_tables.py                                  # then fills the table of docs/external.md

The pipeline has the real classes of FLUX.1 with random weights, since diffusers reads a .gguf file for few classes: closeness to the float
model says what rounding does, and nothing says how good a picture is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import nn

import ditbench  # noqa: F401 (so that a torchvision without its operators can be imported)

FLOAT_LAYERS = [
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "norm_out",
]  # by parts of names, as diffusers leaves them out


def pipeline() -> diffusers.FluxPipeline:
    """Blocks of 256 channels, wide enough that codes outweigh their scales."""
    from small_pipelines import SMALL, SMALL_TEXT, lively

    torch.manual_seed(0)
    pipe = SMALL["flux"]()
    pipe.register_modules(
        transformer=lively(diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=4,
            joint_attention_dim=SMALL_TEXT, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
        ))
    )  # fmt: skip
    return pipe


def by_diffusers(folder: Path, out: Path, quantizer: object) -> None:
    """What diffusers quantizes while it loads, and saves."""
    made = diffusers.FluxTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=quantizer, torch_dtype=torch.float32
    )
    made.save_pretrained(out)


def torchao(config: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        from torchao import quantization

        quantizer = diffusers.TorchAoConfig(getattr(quantization, config)(), modules_to_not_convert=FLOAT_LAYERS)
        by_diffusers(folder, out, quantizer)

    return make


def quanto(dtype: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        by_diffusers(folder, out, diffusers.QuantoConfig(weights_dtype=dtype, modules_to_not_convert=FLOAT_LAYERS))

    return make


def sdnq(dtype: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        from sdnq import SDNQConfig

        by_diffusers(folder, out, SDNQConfig(weights_dtype=dtype, modules_to_not_convert=FLOAT_LAYERS))

    return make


def bitsandbytes(bits: int) -> Callable[[Path, Path], None]:
    """diffusers asks for a GPU before it quantizes by bitsandbytes, so its layers are put in by hand, under the names it saves them with.

    A skipped name skips every layer whose last part it is; the last layer's 16 channels are too few for its CPU kernel of nf4.
    """

    def make(folder: Path, out: Path) -> None:
        from layers_of_others import of_bitsandbytes

        made = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
        for name, linear in list(made.named_modules()):
            place, _, last = name.rpartition(".")
            if isinstance(linear, nn.Linear) and not name.startswith(tuple(FLOAT_LAYERS)) and last != "proj_out":
                setattr(made.get_submodule(place), last, of_bitsandbytes(linear, bits))
        config = diffusers.BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[*FLOAT_LAYERS, "proj_out"],
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        made.register_to_config(quantization_config=config)
        made.save_pretrained(out)

    return make


def gguf(kind: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, out: Path) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter, quants

        code, writer = GGMLQuantizationType[kind], GGUFWriter(str(out), "flux")
        made = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
        for name, tensor in made.state_dict().items():
            values = tensor.float().numpy()
            if tensor.ndim == 2 and not name.startswith(tuple(FLOAT_LAYERS)):
                writer.add_tensor(name, quants.quantize(values, code), raw_dtype=code)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return make


CHECKPOINTS: dict[str, Callable[[Path, Path], None]] = {
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int8-int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto-int8": quanto("int8"),
    "bitsandbytes-int8": bitsandbytes(8),
    "bitsandbytes-nf4": bitsandbytes(4),
    "q8_0.gguf": gguf("Q8_0"),
    "q4_0.gguf": gguf("Q4_0"),
    "sdnq-int8": sdnq("int8"),
    "sdnq-int4": sdnq("int4"),
}
COMMON = (
    "name=external model=flux.1-dev model.name=small-flux model.source={out}/pipeline model.revision=null 'model.size={{height:32,width:32}}' "
    "model.dtype=float32 generate.dtype=float32 generate.reference_dtype=float32 protocol.n=32 protocol.steps=8 "
    "protocol.prompts=shapes calibration.prompts=shapes-calibration 'metrics.names=[psnr,ssim,sqnr]' tracker=none device=cpu"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--only", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS), metavar="NAME")
    options = parser.parse_args()
    out: Path = options.out
    if not (out / "pipeline").is_dir():
        pipeline().save_pretrained(out / "pipeline")
    for name in options.only:
        CHECKPOINTS[name](out / "pipeline", out / name)
    common = COMMON.format(out=out)
    paths = ",".join(f"{out}/{name}" for name in options.only)
    print(f"ditbench run -m {common} method=rtn,smoothquant,svdquant bits=w8a8,w4a16")
    print(f"ditbench run -m {common} method=external method.path={paths}")


if __name__ == "__main__":
    main()
