"""`vnni_kernels/`, our C++ for x86 CPUs with AVX512-VNNI: compiled on first use, loaded, and what a machine lacks for it.

It is compiled by torch.utils.cpp_extension (about half a minute) and kept beside torch's own extensions (TORCH_EXTENSIONS_DIR).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

from ditbench.harness.backends.base import MachineLacks
from ditbench.harness.common.files import atomic_path, canonical_sha256

LIBRARY = "ditbench_vnni"
LANES, DEPTH = 16, 4  # outputs of a panel, channels that one instruction sums
BACKEND = "vnni"  # by whose name what a machine lacks is told
KERNELS = Path(__file__).parent / "vnni_kernels"
# BF16 is for the attention alone, which calls it by name (`attention.lacks` asks the CPU).
FLAGS = [
    "-O3",
    "-fopenmp",
    "-ffp-contract=off",
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16")),
]


@cache
def load_extension() -> None:
    from torch.utils.cpp_extension import get_default_build_root, load

    sources = sorted(KERNELS.glob("*.cpp"))
    texts = [path.read_text() for path in (*sources, *sorted(KERNELS.glob("*.h")))]
    version = canonical_sha256([texts, FLAGS, torch.__version__, sys.version])[:12]
    compiled = Path(get_default_build_root()) / f"{LIBRARY}-{version}.so"
    if compiled.exists():
        torch.ops.load_library(compiled)
    else:
        print(f"ditbench: compiling {KERNELS.name} (once, {compiled} keeps it)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            load(
                LIBRARY,
                [str(path) for path in sources],
                extra_cflags=FLAGS,
                build_directory=folder,
                is_python_module=False,
            )
            with atomic_path(compiled) as part:
                shutil.copy(Path(folder) / f"{LIBRARY}.so", part)
    torch.library.register_fake(f"{LIBRARY}::quantize_rows", _fake_quantize_rows)
    torch.library.register_fake(f"{LIBRARY}::linear", _fake_linear)
    torch.library.register_fake(f"{LIBRARY}::dequantize", _fake_dequantize)
    torch.library.register_fake(f"{LIBRARY}::attention", _fake_attention)
    torch.library.register_fake(f"{LIBRARY}::rotated", lambda x, *factors: x.new_empty(x.shape, dtype=torch.float32))
    torch.library.register_fake(f"{LIBRARY}::rotated_rows", _fake_rotated_rows)
    torch.library.register_fake(f"{LIBRARY}::normed", lambda x, factor, shift, eps, centred: torch.empty_like(x))
    torch.library.register_fake(f"{LIBRARY}::normed_rows", _fake_normed_rows)
    torch.library.register_fake(f"{LIBRARY}::rotary", lambda x, cosine, sine: torch.empty_like(x))
    torch.library.register_fake(f"{LIBRARY}::gated", lambda x, gate, y: torch.empty_like(x))
    torch.library.register_fake(f"{LIBRARY}::few_rows", lambda x, weight, bias: x.new_empty(len(x), len(weight)))
    torch.library.register_fake(f"{LIBRARY}::activate", lambda x, activation: torch.empty_like(x))


def _fake_quantize_rows(x, scale, zero_point, groups, sum_groups, quant_max, symmetric, clip):
    rows, channels = x.shape
    return (
        x.new_empty(rows, -(-channels // (2 * DEPTH)) * 2 * DEPTH, dtype=torch.uint8),
        x.new_empty(rows, groups, dtype=torch.float32),
        x.new_empty(rows, groups, dtype=torch.int32),
        x.new_empty(rows, sum_groups, dtype=torch.int32),
    )


def _fake_normed_rows(x, factor, shift, eps, centred, *quantizer):
    return torch.empty_like(x), *_fake_quantize_rows(x.flatten(0, 1), *quantizer)


def _fake_rotated_rows(x, signs, left, right, keep, *quantizer):
    rows, channels = x.shape
    kept = x.new_empty(rows if keep else 0, channels, dtype=torch.float32)
    return kept, *_fake_quantize_rows(x, *quantizer)


def _fake_linear(
    codes,
    scale,
    offset,
    sum_,
    packed,
    bits,
    is_signed,
    outputs,
    channels,
    w_scale,
    w_sum,
    w_zero,
    addend,
    bias,
    activation,
    dtype,
):
    return scale.new_empty(len(codes), outputs, dtype=dtype)


def _fake_dequantize(packed, bits, is_signed, scale, zero_point, dtype):
    return scale.new_empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype)


def _fake_attention(q, k, v, mask, scale):
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width)


def _find_ninja() -> None:
    """The one that was installed with us is beside python, which need not be on the PATH."""
    if not shutil.which("ninja"):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


@cache
def cpu_lacks() -> MachineLacks | None:
    if not torch.cpu._is_vnni_supported():
        return MachineLacks(f"{BACKEND} needs a CPU with AVX512-VNNI; without it int8 is no faster than float")
    _find_ninja()
    compiler = os.environ.get("CXX", "g++")
    commands = {compiler: "apt-get install g++", "ninja": "pip install ninja"}
    missing = [tool for tool in commands if not shutil.which(tool)]
    if missing:
        why = f"{BACKEND} needs {' and '.join(missing)} on the PATH: it is compiled on first use"
        return MachineLacks(why, " && ".join(commands[tool] for tool in missing))
    try:
        load_extension()
    except (RuntimeError, OSError) as error:
        return MachineLacks(f"{BACKEND} could not be compiled or loaded: {str(error).splitlines()[0]}")
    return None
