"""W8A8 on x86 CPUs with int8 dot products (AVX512-VNNI), through the oneDNN linear that torch ships for Inductor.

With weight codes w and zero point v, activation codes q and zero point u, scales s_w per channel and s_x per token:

    x' · Ŵᵀ = s_x [ Σ_c (q − u)(w − v) s_w ]
            = s_x [ Σ_c a w s_w  −  (u − 128) Σ_c w s_w  −  v s_w Σ_c (q − u) ],   a = q − 128

The first sum is the integer kernel's; the other two are outer products that vanish for symmetric activations (u = 128)
and symmetric weights (v = 0). They are float32 and partly cancel. Against the simulated path, relative to the largest output:
5e-7 with symmetric activations, 2e-6 with asymmetric ones, and up to 2e-5 when both sides are asymmetric and one outlier
channel leaves the others near code 0.

The operator takes one activation zero point, which is 128: its fast path wants unsigned activations (signed ones run
thousands of times slower), so every activation code is stored as a + 128. It ignores weight zero points without
a word, hence the last sum.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel, MachineLacks
from ditbench.harness.backends.integers import not_integers
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, activation_affine, to_codes
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "onednn_int8"
KIND = "measured"
PRIORITY = 10
SUMMARY = "W8A8 in int8 on x86 CPUs with AVX512-VNNI; weights per channel or tensor, activations per token or tensor"

OPERATORS = {"onednn::qlinear_pointwise": "integer product"}  # for `ditbench bench`
MIDDLE = 128  # between signed and unsigned 8-bit codes


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    if problem := not_integers(NAME, recipe):
        return problem
    weight, act = recipe.weight, recipe.act
    assert isinstance(weight, QuantizedWeight) and act is not None
    if (weight.spec.bits, act.spec.bits) != (8, 8):
        return f"{NAME} runs W8A8, this is W{weight.spec.bits}A{act.spec.bits}"
    if weight.spec.granularity not in ("per_channel", "per_tensor"):
        return f"{NAME} takes weights per_channel or per_tensor, these are {weight.spec.granularity}"
    if act.spec.granularity not in ("per_token", "per_tensor"):
        return f"{NAME} takes activations per_token or per_tensor, these are {act.spec.granularity}"
    if device.type != "cpu":
        return f"{NAME} runs on the CPU, the device is {device}"
    return cpu_lacks()


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return OnednnInt8Kernel(recipe.weight, recipe.act)


class OnednnInt8Kernel(Kernel):
    """Arithmetic in int8, result in float32 whatever the input's dtype.

    The codes are held once, in oneDNN's own layout (`packed_CO`, opaque to torch, exactly invertible). State dicts,
    copies and pickles carry them as plain int8 (O, C) and pack them again.
    """

    scale_O: Tensor
    zero_O: Tensor  # the operator insists on weight zero points, and ignores them
    act_offset_O: Tensor | None
    weight_offset_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        codes_OC, zero_point_O1 = _signed(weight)
        self.act = act
        if act.scale is not None:
            self.act_scale, self.act_zero_point = act.scale, act.zero_point  # counted, and moved with us
        self.packed_CO = _pack(codes_OC)
        self.register_buffer("scale_O", weight.scale_OG[:, 0].float().contiguous())
        self.register_buffer("zero_O", torch.zeros(len(codes_OC), dtype=torch.long), persistent=False)
        # Derived from codes and scales, but part of the state, so that loading a state is all there is to do.
        scale_O1 = weight.scale_OG.double()
        act_offset_O = None if act.spec.symmetric else (codes_OC * scale_O1).sum(1).float()
        weight_offset_O = None if weight.spec.symmetric else (zero_point_O1 * scale_O1)[:, 0].float()
        self.register_buffer("act_offset_O", act_offset_O)
        self.register_buffer("weight_offset_O", weight_offset_O)

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        x_MC = x.reshape(-1, x.shape[-1]).float()
        unsigned_MC, scale, zero_point = self.quantize(x_MC, x.shape, step, overwrite=x.dtype != torch.float32)
        y_MO = self.multiply(unsigned_MC)
        if zero_point is not None:
            assert self.act_offset_O is not None
            y_MO.addcmul_(zero_point - MIDDLE, self.act_offset_O, value=-1)
        if self.weight_offset_O is not None:
            zero = MIDDLE if zero_point is None else zero_point
            sum_M1 = unsigned_MC.sum(1, keepdim=True).float() - zero * unsigned_MC.shape[1]  # whole numbers below 2²⁴
            y_MO.addcmul_(sum_M1, self.weight_offset_O, value=-1)
        return y_MO.mul_(scale).reshape(*x.shape[:-1], -1)

    def quantize(
        self, x_MC: Tensor, shape: torch.Size, step: Tensor | None, *, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes of the simulated path, as a + 128 in uint8; scale and zero_point per row or of the whole tensor.

        shape: of the input before its rows were put under each other; dynamic per-tensor ranges are those of a sample.
        """
        scale, zero_point = activation_affine(x_MC.view(shape), self.act, step)
        if scale.ndim:
            scale = scale.expand(*shape[:-1], 1).reshape(-1, 1)
            zero_point = None if zero_point is None else zero_point.expand(*shape[:-1], 1).reshape(-1, 1)
        codes_MC = to_codes(x_MC, scale, zero_point, self.act.spec, overwrite=overwrite)
        if zero_point is not None:
            codes_MC -= MIDDLE
        # Flipping the sign bit adds 128; casting floats to uint8 instead of int8 takes four times as long.
        return codes_MC.to(torch.int8).view(torch.uint8).bitwise_xor_(MIDDLE), scale, zero_point

    def multiply(self, unsigned_MC: Tensor) -> Tensor:
        """Σ_c a w s_w, float32."""
        return torch.ops.onednn.qlinear_pointwise(
            *(unsigned_MC, 1.0, MIDDLE),  # activations, their scale and zero point
            *(self.packed_CO, self.scale_O, self.zero_O, None),  # weights, their scales and zero points, no bias
            *(1.0, 0, torch.float32, "none", [], ""),  # output scale, zero point and dtype, no post-operation
        )

    def codes_OC(self) -> Tensor:
        """int8, −128 … 127; an asymmetric weight's codes 0 … 255 are stored less 128."""
        return self.packed_CO.to_dense().t().contiguous()

    def get_extra_state(self) -> Tensor:
        return self.codes_OC()

    def set_extra_state(self, state: Tensor) -> None:
        self.packed_CO = _pack(state)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed_CO": self.codes_OC()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"packed_CO": _pack(state["packed_CO"])})


def _signed(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes as int8, with their zero point as float64 (O, 1)."""
    if weight.zero_point_OG is None:
        return weight.codes_OC, torch.zeros(len(weight.codes_OC), 1, dtype=torch.float64)
    return (weight.codes_OC.to(torch.int16) - MIDDLE).to(torch.int8), weight.zero_point_OG.double() - MIDDLE


def _pack(codes_OC: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes_OC.contiguous(), None)


@cache
def cpu_lacks() -> MachineLacks | None:
    """What this machine has not got. The operator is private and once returned wrong values, so it is tried once."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return MachineLacks(f"{NAME} needs a torch built with oneDNN")
    if not torch.cpu._is_vnni_supported():
        return MachineLacks(f"{NAME} needs a CPU with AVX512-VNNI; without it int8 is no faster than float")
    unsigned_MC = torch.arange(0, 255, 3, dtype=torch.uint8).reshape(5, 17)
    codes_OC = torch.arange(-128, 127, 5, dtype=torch.int8).reshape(3, 17)
    expected_MO = (unsigned_MC.long() - MIDDLE) @ codes_OC.long().T
    packed_CO = _pack(codes_OC)
    product_MO = torch.ops.onednn.qlinear_pointwise(
        *(unsigned_MC, 1.0, MIDDLE, packed_CO, torch.ones(3), torch.zeros(3, dtype=torch.long), None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    if torch.equal(product_MO.long(), expected_MO) and torch.equal(packed_CO.to_dense().t(), codes_OC):
        return None
    return MachineLacks(f"{NAME}: qlinear_pointwise of torch {torch.__version__} returns wrong values on this CPU")
