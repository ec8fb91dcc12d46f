"""What fitting costs: seconds and peak memory of calibration and quantization, one fresh process per method.

    python bench/fit_cost.py --out results/bench/fit_cost.jsonl                      # every method, w4a4
    python bench/fit_cost.py --methods svdquant clq --blocks 4 --limit-minutes 40

Runs on `dit-xl-2-256-random`: the true shapes of DiT-XL/2, no download. Each line of the output says what was run and where.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch

from harness import methods
from harness.calibrate import calibrate
from harness.config import parse
from harness.environment import environment
from harness.memory import peak_memory
from harness.run import cached_model, reason, stage_quantize
from harness.sweep import composed

MODEL = "dit-xl-2-256-random"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [name for name in methods.known_methods() if name != methods.FLOAT]
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--blocks", type=int, help="the first blocks only (default: all 28)")
    parser.add_argument("--samples", type=int, default=2, help="calibration samples")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--limit-minutes", type=float, default=60, help="per method")
    parser.add_argument("--out", type=Path, help="one JSON line per method is appended here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(fit(options.one, options)))
        return
    lines = []
    for name in options.methods:
        lines.append(in_a_fresh_process(name, options))
        print(described(lines[-1]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")


def in_a_fresh_process(name: str, options: argparse.Namespace) -> dict:
    arguments = [f"--{key}={getattr(options, key)}" for key in ("bits", "samples", "steps")]
    arguments += [f"--blocks={options.blocks}"] if options.blocks else []
    try:
        done = subprocess.run(
            [sys.executable, __file__, f"--one={name}", *arguments],
            stdout=subprocess.PIPE,
            timeout=60 * options.limit_minutes,
            text=True,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return {"method": name, "bits": options.bits, "error": f"not done in {options.limit_minutes:g} minutes"}
    except subprocess.CalledProcessError as error:
        return {"method": name, "bits": options.bits, "error": f"the process ended with {error.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def fit(name: str, options: argparse.Namespace) -> dict:
    overrides = [
        f"model={MODEL}",
        f"method={name}",
        f"bits={options.bits}",
        f"calibration.n={options.samples}",
        f"protocol.steps={options.steps}",
        "device=cpu",
    ]
    overrides += [f"model.random.num_layers={options.blocks}"] if options.blocks else []
    (raw,) = composed([overrides])
    config = parse(raw)
    model = cached_model(json.dumps(asdict(config.model), sort_keys=True))
    found = {
        "method": name,
        "bits": options.bits,
        "model": MODEL,
        "blocks": len(model.transformer.transformer_blocks),
        "samples": options.samples,
        "steps": options.steps,
        "error": None,
        "env": environment(torch.device("cpu"), config.seed),
    }
    target = model.target(config.protocol.scope, config.protocol.skip, config.protocol.attention)
    with peak_memory(torch.device("cpu")) as memory:
        start = perf_counter()
        try:
            recording = calibrate(model, config.protocol.sampler, options.samples, config.seed)  # and nothing cached
            calibrated = perf_counter()
            stage_quantize(config, target, recording)
        except Exception as error:
            return found | {"error": reason(error)}
        found |= {"calibrate_s": calibrated - start, "quantize_s": perf_counter() - calibrated}
    return found | {"peak_memory_bytes": memory.peak_bytes, "memory_before_bytes": memory.before_bytes}


def described(line: dict) -> str:
    if line.get("error"):
        return f"{line['method']:12} {line['bits']}  {line['error']}"
    seconds = line["calibrate_s"] + line["quantize_s"]
    peak, before = line["peak_memory_bytes"] or 0, line["memory_before_bytes"] or 0
    return (
        f"{line['method']:12} {line['bits']}  {line['blocks']:3} blocks  {seconds:8.1f} s"
        f"  peak {peak / GIB:5.2f} GiB (model and libraries {before / GIB:.2f})"
    )


if __name__ == "__main__":
    main()
