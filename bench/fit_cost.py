"""What fitting costs: seconds and peak memory of calibration and quantization, one fresh process per method.

    python bench/fit_cost.py --out results/bench/fit_cost.jsonl                      # every method, w4a4
    python bench/fit_cost.py --methods svdquant clq --blocks 4 --limit-minutes 40

The default model is `dit-xl-2-256-random`: the true shapes of DiT-XL/2, no download. Each line of the output says what was
run, where, and whether it was ok, refused (by a message to the user) or an error. `fit_s` is wall time; on a machine that
does other work as well, `cpu_s` (without what the cache saved) says more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch

from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.memory import peak_memory
from ditbench.harness.common.timer import Timer
from ditbench.harness.fitting import registry
from ditbench.harness.records.environment import environment
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import fit_cost, quantize, target_of
from ditbench.harness.sweep.compose import composed

PASSED_ON = ("model", "bits", "samples", "steps")  # to the process of one method
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [name for name in registry.known_methods() if name != registry.FLOAT]
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--model", default="dit-xl-2-256-random")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--blocks", type=int, help="of a model with random weights: so many instead of its own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further values of the configuration")
    parser.add_argument("--samples", type=int, default=2, help="calibration samples")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--limit-minutes", type=float, default=60, help="per method")
    parser.add_argument(
        "--cache", type=Path, help="keep the calibration here; what it saves is added to a method's time"
    )
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
    print("", *map(described, sorted(lines, key=lambda line: line.get("fit_s", 0.0))), sep="\n")


def in_a_fresh_process(name: str, options: argparse.Namespace) -> dict:
    arguments = [f"--{key}={getattr(options, key)}" for key in PASSED_ON]
    arguments += [f"--{key}={getattr(options, key)}" for key in ("blocks", "cache") if getattr(options, key)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, f"--one={name}", *arguments, "--set", *options.set],
            stdout=subprocess.PIPE,
            timeout=60 * options.limit_minutes,
            text=True,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return asked(name, options) | {"status": "error", "error": f"not done in {options.limit_minutes:g} minutes"}
    except subprocess.CalledProcessError as error:
        return asked(name, options) | {"status": "error", "error": f"the process ended with {error.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def asked(name: str, options: argparse.Namespace) -> dict:
    wanted = {"method": name} | {key: getattr(options, key) for key in (*PASSED_ON, "blocks", "set")}
    return wanted | {"env": environment(torch.device("cpu"), seed=0)}


def fit(name: str, options: argparse.Namespace) -> dict:
    overrides = [
        f"model={options.model}",
        f"method={name}",
        f"bits={options.bits}",
        f"calibration.n={options.samples}",
        f"protocol.steps={options.steps}",
        "seed=0",
        "device=cpu",
        *options.set,
    ]
    overrides += [f"model.random.num_layers={options.blocks}"] if options.blocks else []
    (raw,) = composed([overrides])
    config = parse(raw)
    model = model_of(config.model)
    target = target_of(config, model)
    found = asked(name, options) | {"blocks": len(target.blocks), "status": "ok", "error": None}
    timer, cpu_start_s = Timer(), process_time()
    with peak_memory(config.device) as memory:
        try:
            with timer("calibrate"):
                recording = calibrate(model, config.protocol.sampler, options.samples, config.seed, cache=options.cache)
            recording = replace(recording, cache=None)  # what is fitted here is measured, not found
            with timer("quantize"):
                quantize(config, model, target.without(recording.unreached), recording)
        except Exception as error:
            return found | {"status": "refused" if isinstance(error, UserError) else "error", "error": reason(error)}
    return found | fit_cost(timer.seconds, recording, memory) | {"cpu_s": process_time() - cpu_start_s}


def described(line: dict) -> str:
    what = f"{line['method']:12} {line['bits']}  {line['blocks'] or 'all':>3} blocks"
    if line["status"] != "ok":
        return f"{what}  {line['status']}: {line['error']}"
    peak, before = (f"{(line[f'{key}_bytes'] or 0) / GIB:5.2f}" for key in ("peak_memory", "memory_before"))
    return (
        f"{what}  {line['fit_s']:8.1f} s ({line['cpu_s']:.1f} s of CPU)  peak {peak} GiB (model and libraries {before})"
    )


if __name__ == "__main__":
    main()
