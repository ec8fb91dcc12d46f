#!/usr/bin/env bash
# The wheels that `bench/gpu.sh` lacks on a machine with a GPU and no network: run this where there is one, then take the folder there.
# Such a machine has torch, triton, transformers, torchmetrics and what they need, and scipy, pillow and pytest. All wheels made here are of
# pure Python, so that any version of it and any processor will do; torchao (a second opinion on the blocks) comes with its own kernels.
#   bench/gpu_wheels.sh OUT_FOLDER [FURTHER_PACKAGE …]
set -euo pipefail
out=${1:?usage: bench/gpu_wheels.sh OUT_FOLDER [FURTHER_PACKAGE …]}
most_mib=40
mkdir -p "$out"
# hydra-core 1.3 asks for omegaconf < 2.4 and antlr4 4.9.3, which is published as source only.
python3 -m pip wheel -q --no-deps --wheel-dir "$out" "antlr4-python3-runtime==4.9.3"
python3 -m pip download -q --no-deps --only-binary=:all: --dest "$out" \
  "diffusers>=0.42" "hydra-core>=1.3.2,<1.4" "omegaconf>=2.3,<2.4" importlib_metadata zipp threadpoolctl "${@:2}"
python3 -m pip download -q --no-deps --only-binary=:all: --dest "$out" torchao || echo "torchao left out" >&2
du -ch "$out"/*.whl
mib=$(($(du -cb "$out"/*.whl | tail -n 1 | cut -f 1) / 1048576))
if ((mib > most_mib)); then
  echo "$out holds $mib MiB; at most $most_mib MiB are wanted, leave out some further packages" >&2
  exit 1
fi
