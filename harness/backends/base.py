"""The contract of a backend, and the choice of one per layer.

A backend module has NAME, KIND ("measured" or "simulated"), PRIORITY (the highest capable one is chosen),
`unsupported(recipe, device) -> str | None` (the reason why not; a `MachineLacks` where the machine could be mended or is too old) and `make_kernel(recipe, weight_OC) -> Kernel`; and if it
likes, OPERATORS: {name of an operator in a profile: the part of a layer it does}, for `ditbench bench`, and LAYER_LIMIT: how far its results
may be from simulated ones, where they leave in 16 bits, for `ditbench parity`.
Backends never know methods; they see a recipe and the device.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Transform

AUTO = "auto"


class MachineLacks(str):
    """A reason of `unsupported` that is this machine's and not the recipe's. mend: a command that helps, or nothing does."""

    mend: str

    def __new__(cls, why: str, mend: str = "") -> MachineLacks:
        made = super().__new__(cls, why)
        made.mend = mend
        return made


class Kernel(nn.Module):
    """forward(x', step) → x' · Ŵᵀ without bias, where x' (…, C) is the transformed input.

    Everything that has to be stored to run the layer is a buffer, so that bytes can be counted.

    bias_dtype: what it adds biases in, so that they are held in it, once rounded as the model's are; None: the model's.
    """

    bias_dtype: torch.dtype | None = None

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of what was made of the buffers at run time, and can be made again."""


class FusedKernel(Kernel):
    """A kernel that takes over what a QuantLinear does around it: transform, low-rank branch, bias and the cast back.

    activations: which of `activations.NUMBERS` it can end in as well; `layer` then takes one by the name of `activation`.

    Layers that read one tensor and treat it alike quantize it once (`build/shared_inputs.py`): where `rows_like` says so, what `rows` of
    one kernel gave is taken by `layer` of the other, by the name of `rows`.
    """

    activations: frozenset[str] = frozenset()

    def rows_like(self, other: FusedKernel) -> bool:
        """Whether both make the same of an x' of their width."""
        return False

    def rows(self, x: Tensor, step: Tensor | None, transform: Transform | None, *, keep: bool) -> Any:
        """x (…, C), transformed and quantized. keep: with x', for a low-rank branch; where that is x itself, without it."""
        raise NotImplementedError

    def normed(
        self,
        x: Tensor,
        norm: Any,
        factor_BC: Tensor | None,
        shift_BC: Tensor | None,
        step: Tensor | None,
        *,
        keep: bool,
    ) -> tuple[Tensor | None, Any] | None:
        """norm(x) · factor + shift of x (B, T, C), in one pass with what `rows` makes of it without a transform → both, or None.

        norm: has eps, and says whether it is centred (LayerNorm) or not (RMSNorm). factor, shift: bfloat16 or float32, (B, C) or (1, C).
        keep: the floats are needed beside the codes; else they may be None.
        """
        return None

    def layer(
        self,
        x: Tensor,
        step: Tensor | None,
        transform: Transform | None,
        low_rank: tuple[Tensor, Tensor] | None,
        bias: StepTable | None,
    ) -> Tensor:
        """x (…, C) → kernel(x') + (x' · downᵀ) · upᵀ + bias in the dtype of x; low_rank: (down_rC, up_Or)."""
        raise NotImplementedError


class Backend(Protocol):
    NAME: str
    KIND: str
    PRIORITY: int
    SUMMARY: str

    def unsupported(self, recipe: LayerRecipe, device: torch.device) -> str | None: ...

    def make_kernel(self, recipe: LayerRecipe, weight_OC: Tensor) -> Kernel: ...


@cache
def known_backends() -> dict[str, Backend]:
    """Every backend module of this folder, the fastest first."""
    import ditbench.harness.backends as package

    modules = [
        importlib.import_module(f"ditbench.harness.backends.{m.name}") for m in pkgutil.iter_modules(package.__path__)
    ]
    found = [module for module in modules if hasattr(module, "PRIORITY")]
    return {module.NAME: module for module in sorted(found, key=lambda module: -module.PRIORITY)}  # type: ignore[misc]


def choose(recipe: LayerRecipe, device: torch.device, wanted: str = AUTO) -> Backend:
    """The backend for one layer.

    Raises:
        UserError: the wanted backend is unknown, or cannot run this recipe on this device.
    """
    backends = known_backends()
    if wanted == AUTO:
        return next(b for b in backends.values() if b.unsupported(recipe, device) is None)
    if wanted not in backends:
        raise unknown_name("backend", wanted, [AUTO, *backends])
    reason = backends[wanted].unsupported(recipe, device)
    if reason is not None:
        raise UserError(f"backend={wanted} cannot run this: {reason}; use backend=auto or backend=simulate")
    return backends[wanted]
