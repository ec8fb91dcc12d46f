#!/usr/bin/env bash
# All that needs a CUDA device, in at most ten minutes on a bare machine: torch, triton, transformers, torchmetrics, scipy, pillow and
# pytest, no network. What else the runs import lies as wheels in $WHEELS (default .whl), made by bench/gpu_wheels.sh elsewhere.
#   bench/gpu.sh OUT_FOLDER          on a GPU
#   bench/gpu.sh OUT_FOLDER --dry    tiny, on the CPU, in Triton's interpreter: shows that every part runs, times nothing
# Every part has its own time limit, and writes its table into OUT_FOLDER/summary.md as it finishes; one that breaks or is too slow
# costs the others nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT_FOLDER [--dry]}")
dry=${2:-}
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

# Kernels against their simulation. Every case compiles its own: on several processes where pytest-xdist is there.
many=$(python3 -c 'import xdist; print("-n 8")' 2>/dev/null)
if [[ -n $dry ]]; then which=(-m "not gpu" -k "no_token or compiled_layer or two_launches" tests/backends/test_cuda.py tests/backends/test_cuda_fused_blocks.py); else which=(-m gpu tests/backends tests/test_gpu.py); fi
part tests 130 python3 -m pytest -q -p no:cacheprovider $many "${which[@]}"
table <(grep -E '^(FAILED|ERROR|[0-9]+ (passed|failed)|=+ .*(passed|failed))' "$out/tests.log" | tail -n 40)

# Blocks of PixArt and FLUX at 4,096 tokens against bf16, torchao and the roofline.
part blocks 250 python3 bench/gpu_blocks.py --out "$out" --limit 110 ${dry:+--dry}
table "$out/gpu_blocks.md"

# A text-to-image family whole, random and small: text encoders, calibration, method, images.
family() {
  python3 -c 'import sys, torch; from small_pipelines import SMALL; torch.manual_seed(0); SMALL["flux"]().save_pretrained(sys.argv[1])' "$out/small-flux" &&
    "${ditbench[@]}" run -m name=family "${on[@]}" "${few[@]}" model=flux.1-schnell model.name=small-flux model.source="$out/small-flux" model.revision=null \
      'model.size={height:16,width:16}' protocol.prompts=shapes calibration.prompts=shapes-calibration 'metrics.names=[psnr,sqnr,collapse]' \
      method=rtn,quarot bits=w8a8,w4a8,fp8
}
part family 80 bash -c "$(declare -p out on few ditbench); $(declare -f family); family"
records family

# DiT-XL/2 with random weights, true size: steps, latency and memory, no layer errors.
size=(measure.samples=8)
[[ -z $dry ]] || size=(measure.samples=1 measure.repeats=1 measure.warmup=0 model.random.num_layers=1)
part dit-xl 120 "${ditbench[@]}" run -m name=dit-xl "${on[@]}" model=dit-xl-2-256-random "${size[@]}" measure.layer_errors=false \
  generate.noise_floor_seeds=0 calibration.n=4 metrics.resamples=10 method=rtn,quarot bits=w8a8,fp8,w4a8
records dit-xl

part backends 30 "${ditbench[@]}" list backends
table "$out/backends.log"
cat "$out/summary.md"
exit $failed
