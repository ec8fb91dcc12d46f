#!/usr/bin/env bash
# All that needs a CUDA device, in at most ten minutes on a bare machine: torch, triton, transformers, torchmetrics, scipy, pillow and
# pytest, no network. What else the runs import lies as wheels in $WHEELS (default .whl), made by bench/gpu_wheels.sh elsewhere.
#   bench/gpu.sh OUT_FOLDER          on a GPU
#   bench/gpu.sh OUT_FOLDER --dry    tiny, on the CPU, in Triton's interpreter: shows that every part runs, times nothing
#   bench/gpu.sh OUT_FOLDER [--dry] blocks dit-xl    these parts alone
# Every part has its own time limit, and writes its table into OUT_FOLDER/summary.md as it finishes; one that breaks or is too slow
# costs the others nothing, and what it had found is in the table. The parts come in the order of what they are worth.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT_FOLDER [--dry] [PART …]}")
shift
dry=
if [[ ${1:-} == --dry ]]; then dry=$1; shift; fi
parts=${*:-tests blocks dit-xl family backends}
ends=$((SECONDS + 550)) # of the parts; the tables of records take seconds
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD:$PWD/tests"
export DITBENCH_OFFLINE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
ditbench=(python3 -m ditbench)

if ! python3 -c 'import diffusers, hydra, threadpoolctl' 2>/dev/null; then
  wheels=${WHEELS:-.whl}
  compgen -G "$wheels/*.whl" >/dev/null || { echo "no diffusers or hydra here, and no wheels in $wheels: make them with bench/gpu_wheels.sh" >&2; exit 1; }
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --target "$site" "$wheels"/*.whl || exit 1
  PYTHONPATH="$site:$PYTHONPATH"
fi
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "· torch", torch.__version__)')
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv >"$out/device.csv" 2>/dev/null || rm -f "$out/device.csv"
printf '%s%s, %s, commit %s\n' "$device" "${dry:+ · dry run, no times}" "$(date -u +%FT%RZ)" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" >"$out/summary.md"

failed=0
wanted() { [[ " $parts " == *" $1 "* ]]; }
part() { # name, seconds, command: at most its own time, and what is left of all
  local limit=$(($2 < ends - SECONDS ? $2 : ends - SECONDS)) began=$SECONDS code=0
  ((limit > 0)) || limit=1
  echo "== $1 (at most $limit s)"
  timeout -k 5 "$limit" "${@:3}" >"$out/$1.log" 2>&1 || code=$?
  tail -n 15 "$out/$1.log"
  local how="done"
  ((code == 0)) || { how="failed with $code"; failed=1; }
  ((code != 124 && code != 137)) || how="stopped after $limit s"
  printf '\n## %s: %s, %s s\n' "$1" "$how" $((SECONDS - began)) >>"$out/summary.md"
}
table() { # of a file, or the end of a log
  { echo; cat "$@" 2>/dev/null; } >>"$out/summary.md"
}
records() { # experiment: what was recorded, whether or not its part came to an end
  timeout 20 "${ditbench[@]}" report --experiment "$1" --results-dir "$out/results" --format md --out "$out/$1.md" >/dev/null 2>"$out/$1.report.log"
  table "$out/$1.md"
}

on=(device=cuda tracker=none results_dir="$out/results")
few=(protocol.steps=4 protocol.n=4 calibration.n=4 generate.noise_floor_seeds=0 metrics.resamples=10)
if [[ -n $dry ]]; then
  export OMP_NUM_THREADS=1
  on=(device=cpu tracker=none results_dir="$out/results")
  few=(protocol.steps=2 protocol.n=2 calibration.n=2 generate.noise_floor_seeds=0 metrics.resamples=2 measure.samples=1 measure.repeats=1 measure.warmup=0)
fi

# Kernels against their simulation. Every case compiles its own: on several processes where pytest-xdist and the cores for it are there.
# Verbose, so that a run that was stopped has said of each test how it went.
if wanted tests; then
  at_once=$(($(nproc) / 2 < 8 ? $(nproc) / 2 : 8))
  ((at_once > 1)) && python3 -c 'import xdist' 2>/dev/null && many=(-n "$at_once") || many=()
  if [[ -n $dry ]]; then which=(-m "not gpu" -k "no_token or compiled_layer or two_launches" tests/backends/test_cuda.py tests/backends/test_cuda_fused_blocks.py); else which=(-m gpu tests/backends tests/test_gpu.py); fi
  part tests 130 python3 -m pytest -v -p no:cacheprovider "${many[@]}" "${which[@]}"
  table <(printf '%s tests passed\n' "$(grep -cE '(^| )PASSED( |$)' "$out/tests.log")"; grep -oE '(FAILED|ERROR) tests/.*|tests/.* (FAILED|ERROR)' "$out/tests.log" | tail -n 60)
fi

# Blocks of PixArt and FLUX at 4,096 tokens against bf16, torchao and the roofline. What PixArt's compile is there for FLUX's.
if wanted blocks; then
  part blocks 250 python3 bench/gpu_blocks.py --out "$out" --limit 220 ${dry:+--dry}
  table "$out/gpu_blocks.md"
fi

# DiT-XL/2 with random weights, true size: steps, latency and memory, no layer errors.
if wanted dit-xl; then
  size=(measure.samples=8)
  [[ -z $dry ]] || size=(measure.samples=1 measure.repeats=1 measure.warmup=0 model.random.num_layers=1)
  part dit-xl 120 "${ditbench[@]}" run -m name=dit-xl "${on[@]}" model=dit-xl-2-256-random "${size[@]}" measure.layer_errors=false \
    generate.noise_floor_seeds=0 calibration.n=4 metrics.resamples=10 method=rtn,quarot bits=w8a8,fp8,w4a8
  records dit-xl
fi

# A text-to-image family whole, random and small: text encoders, calibration, method, images.
family() {
  python3 -c 'import sys, torch; from small_pipelines import SMALL; torch.manual_seed(0); SMALL["flux"]().save_pretrained(sys.argv[1])' "$out/small-flux" &&
    "${ditbench[@]}" run -m name=family "${on[@]}" "${few[@]}" model=flux.1-schnell model.name=small-flux model.source="$out/small-flux" model.revision=null \
      'model.size={height:16,width:16}' protocol.prompts=shapes calibration.prompts=shapes-calibration 'metrics.names=[psnr,sqnr,collapse]' \
      method=rtn,quarot bits=w8a8,w4a8,fp8
}
if wanted family; then
  part family 80 bash -c "$(declare -p out on few ditbench); $(declare -f family); family"
  records family
fi

if wanted backends; then
  part backends 30 "${ditbench[@]}" list backends
  table "$out/backends.log"
fi
cat "$out/summary.md"
exit $failed
