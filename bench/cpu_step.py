"""One denoising step of a DiT-XL/2-shaped transformer with random weights on the CPU: bf16 against W8A8, both eager.

    python bench/cpu_step.py --blocks 28 --repeats 15

Latencies are interleaved in one process; the quantized share is taken from torch.profiler in separate calls.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from harness.backends import onednn_int8
from harness.backends.onednn_int8 import OnednnInt8Kernel
from harness.measure import backends_of, kind_of, measure
from harness.models.base import LoadedModel, ModelSpec, load_model
from harness.quant.build import build
from harness.quant.layer import QuantLinear
from harness.quant.spec import Bits, QuantSpec
from methods import rtn

W8A8 = Bits(QuantSpec(8, "per_channel"), QuantSpec(8, "per_token", dynamic=True))
PARTS = {  # label: (class, method); nested, so each part's own time is its total less that of the parts inside it
    "quantize activations": (OnednnInt8Kernel, "quantize"),
    "integer product": (OnednnInt8Kernel, "multiply"),
    "scale, other kernel parts": (OnednnInt8Kernel, "forward"),
    "bias, cast": (QuantLinear, "forward"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="28 is DiT-XL/2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = load_model(dit_xl(options.blocks))
    target = model.target()
    recipe = rtn.apply(target, {}, W8A8, rtn.Params())  # dynamic activations: nothing to calibrate
    quantized = build(target, recipe, dtype=torch.bfloat16, backend=onednn_int8.NAME)
    times = measure(
        model,
        target,
        quantized,
        kind=kind_of(quantized, quantized_attention=False),
        samples=1,
        repeats=options.repeats,
        warmup=3,
        device=torch.device("cpu"),
    )
    print(
        f"{times['device']}, {options.blocks} blocks, {times['step_rows']} rows of 256 tokens, {backends_of(quantized)}"
    )
    for name in ("baseline_latency_ms", "latency_ms"):
        median, p10, p90 = (times[name][q] for q in ("median", "p10", "p90"))
        print(f"  {name:22} median {median:7.1f}   p10 {p10:7.1f}   p90 {p90:7.1f}")
    print(f"  speedup                {times['speedup']:.3f}")
    before, after = (times[name] / 1e6 for name in ("baseline_peak_memory_bytes", "peak_memory_bytes"))
    print(f"  peak memory            {before:.0f} → {after:.0f} MB")
    for part, share in shares(quantized, model).items():
        print(f"  {part:28} {100 * share:5.1f} % of the quantized step")


def dit_xl(blocks: int) -> ModelSpec:
    shape = {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": blocks,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    return ModelSpec(name=f"dit-xl-2-random-{blocks}", family="dit", random=shape, dtype="bfloat16")


@torch.no_grad()
def shares(quantized: nn.Module, model: LoadedModel, calls: int = 5) -> dict[str, float]:
    """Share of one step's wall time per part of the quantized layers, and of everything outside them."""
    inputs = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in model.adapter.step_inputs(model.transformer, 2).items()
    }
    originals = {label: getattr(*place) for label, place in PARTS.items()}
    for label, (owner, method) in PARTS.items():
        setattr(owner, method, _labelled(label, originals[label]))
    try:
        quantized(**inputs)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(calls):
                with record_function("step"):
                    quantized(**inputs)
    finally:
        for label, (owner, method) in PARTS.items():
            setattr(owner, method, originals[label])
    total: dict[str, float] = defaultdict(float)
    for event in trace.events():
        total[event.name] += event.time_range.elapsed_us()
    kernel, layer = "scale, other kernel parts", "bias, cast"
    own = {label: total[label] for label in PARTS}
    own[layer] -= total[kernel]
    own[kernel] -= total["quantize activations"] + total["integer product"]
    own["everything outside"] = total["step"] - total[layer]
    return {label: time / total["step"] for label, time in own.items()}


def _labelled(label: str, function):
    def call(*args, **kwargs) -> Tensor:
        with record_function(label):
            return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    main()
