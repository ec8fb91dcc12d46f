#!/usr/bin/env bash
# Numbers from any CUDA machine that has torch: GPU tests, then latency and memory of DiT-XL/2 at its true size.
# Python packages that the machine lacks can lie as wheels in .whl/ (diffusers, hydra-core, omegaconf, antlr4, wandb, …).
#   bench/gpu.sh OUT_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT_FOLDER}
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH="$site:$PWD"
else
  export PYTHONPATH="$PWD"
fi
export DITBENCH_OFFLINE=1 HF_HUB_OFFLINE=1
python3 -m pytest -q -m gpu tests || echo "gpu tests failed" >&2
python3 -m harness.cli run -m device=cuda model=dit-xl-2-256-random method=fp,rtn,quarot bits=w8a8,w4a8 \
  tracker=none name=gpu measure.samples=8 results_dir="$out/results"
python3 -m harness.cli report --experiment gpu --results-dir "$out/results" --format md | tee "$out/gpu.md"
