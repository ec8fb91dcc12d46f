"""A family's whole way with one method, stage by stage as `run.py` goes it, on the CPU and on the second device.

python tests/device_chain.py [family …]     # prints which share of each stage's operations ran on the second device
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ditbench.harness.models.base  # noqa: F401  before diffusers, as a script too: it stands in for what torchvision lacks

# isort: split
import torch
from newer_pipelines import NEWER, NEWER_DRAWN_AS_VIDEO, NEWER_SIZES, family_of
from operations import Operations, counted
from small_pipelines import SIZES, SMALL, wan_of_two_experts
from torch import Tensor, nn

from ditbench.eval import batches
from ditbench.eval.video_judges import CLIP
from ditbench.harness.build.export import load_quantized, save_quantized
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.files import canonical_sha256, tensors_sha256
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.evaluate import evaluate
from ditbench.harness.stages.generate import Drawn, few, float_samples
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.measure import layer_errors, measure
from ditbench.harness.stages.quantize import Quantized, calibrate, quantize, target_of
from ditbench.harness.sweep.compose import composed

N, STEPS = 2, 2
DIT = "dit"  # class-conditional, in pixels, with a judge of its own; the others are told by prompts
TWO = "wan2.2"  # of family wan, two experts
MADE = SMALL | NEWER | {TWO: wan_of_two_experts}
FAMILIES = (DIT, *sorted(MADE))
VIDEO = ("cogvideox", "hunyuan_video", "latte", "ltx", "opensora", "wan", TWO, *NEWER_DRAWN_AS_VIDEO)
PAIRED = ["psnr", "ssim", "sqnr", "collapse"]
METRICS = {  # of images, of videos, of the digits: each with one that a network judges
    True: [*PAIRED, "vbench_style/temporal_flickering", "clipsim"],
    False: [*PAIRED, "clipscore_b32"],
}
METHODS = ("rtn", "smoothquant", "quarot", "svdquant", "gptq")
# All methods: labels and prompts, one stream and two, adaLN and adaLN-single, images and videos.
OF_ALL = (DIT, "flux", "wan")
# What else a family can get wrong for a device: folds and how layers are called; data and blocks.
OF_EACH = ("svdquant", "gptq")
FEW = ("smoothquant",)  # for families that are made of what the others are made of: folds
CHAINS = [
    (family, method)
    for family in FAMILIES
    for method in (FEW if family in NEWER else METHODS if family in OF_ALL else OF_EACH)
]
QUICK = {"svdquant": ("method.num_grids=2",)}  # it searches what it searches, among fewer
REFUSED = {  # what no device makes work: block by block needs blocks in line
    ("generic", "gptq"): "does not know how its blocks are called",
    ("hunyuan_dit", "gptq"): "its later blocks read the outputs of its first ones",
}
STAGES = ("calibrate", "quantize", "generate", "evaluate", "layer errors", "reload")


@dataclass
class Chain:
    """What one run came to, all of it on the CPU. values: of the metrics. errors: the layer atlas's noise, (L, S)."""

    codes: dict[str, Tensor]
    latents: Tensor
    pixels: Tensor
    values: dict[str, float]
    errors: Any
    efficiency: dict[str, Any]
    reloaded: Tensor | None = None


@contextlib.contextmanager
def judges_at(folder: Path) -> Iterator[None]:
    """A small random CLIP, saved as `hf download` would leave it, for whoever asks for CLIP inside."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = sizes | {"image_size": 24, "patch_size": 8}
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    network.save_pretrained(folder / CLIP)
    CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]).save_pretrained(folder / CLIP)
    before = os.environ.get("DITBENCH_JUDGES")
    os.environ["DITBENCH_JUDGES"] = str(folder)
    try:
        yield
    finally:
        del os.environ["DITBENCH_JUDGES"]
        if before is not None:
            os.environ["DITBENCH_JUDGES"] = before


def saved(family: str, folder: Path) -> Path:
    """A small random checkpoint of the family, below the folder."""
    checkpoint = folder / family / "checkpoint"
    if not checkpoint.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            MADE[family]().save_pretrained(checkpoint)
    return checkpoint


def config_of(family: str, method: str, device: str, folder: Path) -> RunConfig:
    """In float32 and simulated, so that two devices can be held against each other."""
    if family == DIT:
        model = ["model=tiny-dit"]
        metrics = [*PAIRED, "accuracy", "torchmetrics/fid_judge"]
    else:
        kind = "wan" if family == TWO else family_of(family)
        size = ",".join(
            f"{name}:{pixels}"
            for name, pixels in (SIZES | NEWER_SIZES).get(kind if family == TWO else family, {}).items()
        )
        model = [
            "model=sd3-medium", f"model.name=small-{family}", f"model.family={kind}", "model.revision=null",
            f"model.source={saved(family, folder)}", f"model.size={{{size}}}" if size else "model.size=null",
            "protocol.sampler=pipeline", "protocol.guidance=2", "protocol.prompts=shapes", "calibration.prompts=shapes-calibration",
        ]  # fmt: skip
        metrics = METRICS[family in VIDEO]
    return parse(composed([[
        *model, f"method={method}", *QUICK.get(method, ()), "bits=w4a8", f"device={device}", "backend=simulate",
        "model.dtype=float32", "generate.dtype=float32", "generate.reference_dtype=float32", f"protocol.n={N}", f"protocol.steps={STEPS}",
        f"generate.batch_size={N}", f"calibration.n={N}", f"calibration.batch_size={N}", "metrics.resamples=5",
        f"metrics.names=[{','.join(metrics)}]", "tracker=none", f"results_dir={folder / family}",
    ]])[0])  # fmt: skip


Recordings = dict[tuple[str, str], Calibration]


@torch.no_grad()
def chain(config: RunConfig, recordings: Recordings, ops: Operations, export: Path | None = None) -> Chain:
    """Calibrate, fit, build, generate, evaluate, measure, layer errors; export and reload, if a folder is given.

    recordings: those that were made, which methods share. Nothing that is computed with comes from a file: tensors of files lie
    at odd addresses, where the CPU rounds some products otherwise (1e-6), and codes at a tie fall the other way.
    """
    model = model_of(config.model)
    for part in (part for part in model.pipe.components.values() if isinstance(part, nn.Module)):
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    target = target_of(config, model)
    known = config.model.name, config.device.type
    if known not in recordings:
        with ops.stage("calibrate"):
            recordings[known] = replace(calibrate(config, model), cache=None)
    recording = recordings[known]
    with ops.stage("quantize"), torch.enable_grad():
        quantized = quantize(config, model, target, recording)
    with ops.stage("generate"):
        images = few(config, model, quantized)
        float_model = float_samples(config, model, seed=config.seed)
    pixels = tensors_sha256({"pixels": images.pixels})  # two methods may draw the same: each is evaluated
    batches._outputs.clear()  # as in a process of its own: what the judge saw of the reference is not known yet
    with ops.stage("evaluate"):
        entries, _ = evaluate(
            config,
            model,
            Drawn(images, canonical_sha256({"pixels": pixels, "method": config.method}), config.cache_dir, {}),
            float_model,
        )
    with ops.stage("measure"):
        efficiency = measure(config, model, target, quantized)
    with ops.stage("layer errors"):
        atlas = layer_errors(config, target, quantized, recording)
    problems = {name: entry["reason"] for name, entry in entries.items() if entry["status"] != "ok"}
    assert not problems and atlas is not None, problems
    found = Chain(
        {name: layer.weight.codes_OC.cpu() for name, layer in quantized.recipe.layers.items() if layer.weight},
        images.latents, images.pixels, {name: entry["value"] for name, entry in entries.items()}, atlas.noise_LS,
        efficiency,
    )  # fmt: skip
    if export is not None:
        with ops.stage("reload"):
            found.reloaded = redrawn(config, model, quantized, export)
    return found


def redrawn(config: RunConfig, model: LoadedModel, quantized: Quantized, folder: Path) -> Tensor:
    """Latents of the exported transformer, loaded on the run's device; on the CPU."""
    save_quantized(folder, target_of(config, model), quantized.recipe, dtype=torch.float32, about={})
    loaded = load_quantized(folder, copy.deepcopy(model.transformer).to(config.device), backend=config.backend)
    wanted = conditions(model, N, config.seed, prompts=config.protocol.prompts)
    drawn = model.adapter.sample(model.pipe, loaded, wanted, config.protocol.sampler, decode=False)
    assert drawn.latents.device.type == config.device.type
    return drawn.latents.cpu()


def main(families: Sequence[str]) -> None:
    import second_device

    print(
        f"{'family':14} {'method':12}" + "".join(f"{stage:>14}" for stage in STAGES) + f"{'latents off':>14}  seconds"
    )
    with tempfile.TemporaryDirectory() as scratch, judges_at(Path(scratch) / "judges"):
        recordings: Recordings = {}
        for family, method in (each for each in CHAINS if each[0] in families):
            if (family, method) in REFUSED:
                print(f"{family:14} {method:12} refused: {REFUSED[family, method]}")
                continue
            start, ops, folder = time.monotonic(), counted(), Path(scratch)
            near = chain(config_of(family, method, "cpu", folder), recordings, counted())
            with second_device.in_use(), ops:
                config = config_of(family, method, "second_device", folder)
                far = chain(config, recordings, ops, folder / f"{family}-{method}")
            known = ops.stages()
            shares = [f"{ops.share_on_second_device(stage):.4%}" if stage in known else "recorded" for stage in STAGES]
            off = float((far.latents - near.latents).abs().max())
            row = f"{family:14} {method:12}" + "".join(f"{share:>14}" for share in shares)
            print(f"{row}{off:>14.1e}  {time.monotonic() - start:.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or FAMILIES)
