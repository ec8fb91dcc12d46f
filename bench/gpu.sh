#!/usr/bin/env bash
# All that needs a CUDA device, in at most ten minutes on a machine with torch and triton: the GPU tests (parity of every kernel
# on the device), blocks of FLUX and PixArt at 4,096 tokens in bf16 and on every backend, the roofline, and runs of DiT-XL/2.
# Python packages that the machine lacks can lie as wheels in .whl/ (diffusers, hydra-core, omegaconf, antlr4, wandb, torchao, …).
#   bench/gpu.sh OUT_FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT_FOLDER}
mkdir -p "$out"
export PYTHONPATH="$PWD"
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH="$site:$PWD"
fi
export DITBENCH_OFFLINE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv >"$out/device.csv"
failed=0
step() { # name, seconds, command: what is slow or broken does not cost the others their turn
  echo "== $1"
  timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || { echo "$1: failed or out of time" >&2 && failed=1; }
}
# Every case compiles its own kernels: on several processes where pytest-xdist is there.
step tests 150 python3 -m pytest -q -p no:cacheprovider -m gpu $(python3 -c 'import xdist; print("-n 8")' 2>/dev/null) \
  tests/backends tests/test_gpu.py
step blocks 300 python3 bench/gpu_blocks.py --out "$out"
step runs 100 python3 -m ditbench run -m device=cuda model=dit-xl-2-256-random method=fp,rtn,quarot bits=w8a8,fp8,w4a8 \
  tracker=none name=gpu measure.samples=8 results_dir="$out/results"
step report 20 python3 -m ditbench report --experiment gpu --results-dir "$out/results" --format md
step matrix 20 python3 -m ditbench list backends
exit $failed
