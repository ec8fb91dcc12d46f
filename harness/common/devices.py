"""Torch devices by name, and what every accelerator answers in the same words: synchronize, memory, its name."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ditbench.harness.common.errors import UserError

BESIDE = (
    "DITBENCH_BESIDE"  # in the environment of a launcher's worker: how many others it started on the same processor
)
AUTO = "auto"
CPU = torch.device("cpu")
LONGEST = 120  # characters of torch's words


def pick_device(name: str) -> torch.device:
    """auto → cuda where there is one, else cpu; any other device that torch has here, by its name (cuda:1, mps, xpu, …).

    Raises:
        UserError: no device of that name, or one that this machine does not have.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()  # meta has no numbers to give back
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, ModuleNotFoundError) as error:
        raise UserError(
            f"device={name!r} cannot be used here ({_why_not(name, error)}); known here: {', '.join(known_here())}"
        ) from error
    if device.type != "cpu":
        return device
    if device.index:
        raise UserError(f"device={name!r}: there is one CPU; known here: {', '.join(known_here())}")
    return torch.device("cpu")


def _why_not(name: str, error: BaseException) -> str:
    """A few words: torch may go on for a page about its backends."""
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if kind == "cuda" and not torch.cuda.is_available():
        return "no CUDA device, or no driver for one"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "no MPS here"
    if name != name.lower() and name.lower() in known_here():
        return f"write it {name.lower()}"
    if "Expected one of" in str(error):  # and then all that torch was ever built for
        return "torch knows no device of that name"
    sentence = re.split(r"(?<=\w)\. |\n|: ", str(error).strip())[0]
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 1]}…"


def known_here() -> list[str]:
    """Names that `device=` takes on this machine."""
    found = [AUTO, "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    found += [f"xpu:{index}" for index in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    other = accelerator()
    if other is not None and other.type not in ("cuda", "mps", "xpu"):  # one that whoever imports it has registered
        found += [f"{other.type}:{index}" for index in range(torch.accelerator.device_count())]
    return found


def kinds_here() -> list[torch.device]:
    """One device of each kind: the CPU, and cuda and what else this machine has."""
    found = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    other = accelerator()
    return [*found, torch.device(other.type)] if other is not None and other.type != "cuda" else found


def accelerator() -> torch.device | None:
    """The one that torch knows here; a registered out-of-tree one before cuda."""
    return torch.accelerator.current_accelerator(check_available=True)


def functions_of(device: torch.device) -> ModuleType | None:
    """torch.cuda, torch.xpu, … of the device; None for the CPU and for a device that registered none."""
    if device.type == "cpu":
        return None
    try:
        return torch.get_device_module(device)
    except RuntimeError:
        return None


def float64_device(device: torch.device | str) -> torch.device:
    """Where what needs float64 is computed: on the device itself, or on the CPU where that has none (mps, some xpu)."""
    here = torch.empty(0, device=device).device  # with its index
    return here if _has_float64(here) else torch.device("cpu")


def in_float64(tensor: Tensor) -> Tensor:
    """On its own device, or on the CPU where that has no float64."""
    return tensor.to(float64_device(tensor.device)).double()


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def synchronize(device: torch.device) -> None:
    """Wait until what was launched on the device is done."""
    functions = functions_of(device)
    if functions is not None and hasattr(functions, "synchronize"):
        functions.synchronize() if device.type == "mps" else functions.synchronize(device)


def memory_of(device: torch.device) -> ModuleType | None:
    """The device's functions, if its allocator tells what is held and the most that was."""
    functions = functions_of(device)
    told = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
    return functions if all(hasattr(functions, each) for each in told) else None


def device_name(device: torch.device) -> str:
    """The hardware: "NVIDIA H100 80GB HBM3", or the CPU's model and the number of threads."""
    functions = functions_of(device)
    if functions is not None and hasattr(functions, "get_device_name"):
        return functions.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.get_num_threads()} threads)"


def computes_as(device: torch.device) -> str:
    """What decides how the last bits of an operation are rounded, threads aside: a GPU's model; of a CPU the instructions by which
    torch and our kernels choose their code. Of two machines it may differ though both are "cpu".
    """
    if device.type != "cpu":
        return device_name(device)
    asked = {"vnni": "_is_vnni_supported", "bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    has = [name for name, question in asked.items() if getattr(torch.cpu, question, bool)()]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *has])


def visible_devices() -> list[str]:
    """The CUDA devices of this process, each as CUDA_VISIBLE_DEVICES has to name it for a process of ours to see it alone."""
    here = [str(index) for index in range(torch.cuda.device_count())]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return here if named is None else named.split(",")[: len(here)]
