"""Which layers read what a GELU or a SiLU gives, in every family, beside what the values say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import MADE, small_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.activated import GELU, SILU, activation_readers
from ditbench.harness.calibration.recording import Calibration, calibrate, without_data
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import Sampler
from ditbench.harness.quant.target import Site, Target, is_linear_map
from ditbench.harness.samples.samples import Prompt

BEHIND = {  # some of each family's, by the source of its transformer
    "chroma": {"transformer_blocks.0.ff.net.2": GELU, "transformer_blocks.0.ff_context.net.2": GELU},
    "flux": {"transformer_blocks.0.ff.net.2": GELU, "transformer_blocks.0.ff_context.net.2": GELU, "norm_out.linear": SILU},
    "flux2": {"double_stream_modulation_img.linear": SILU, "single_stream_modulation.linear": SILU},
    "hunyuan_video15": {"transformer_blocks.0.ff.net.2": GELU, "transformer_blocks.0.ff_context.net.2": GELU},
    "kandinsky5": {"visual_transformer_blocks.0.feed_forward.out_layer": GELU},
    "latte": {"transformer_blocks.0.ff.net.2": GELU, "temporal_transformer_blocks.0.ff.net.2": GELU},
    "ltx": {"transformer_blocks.0.ff.net.2": GELU, "caption_projection.linear_2": GELU},
    "opensora": {"spatial_blocks.0.mlp.fc2": GELU, "y_embedder.y_proj.fc2": GELU, "t_block.1": SILU},
    "qwen_image": {"transformer_blocks.0.img_mlp.net.2": GELU, "transformer_blocks.0.txt_mlp.net.2": GELU},
    "wan": {"blocks.0.ffn.net.2": GELU, "condition_embedder.time_proj": SILU},
    "z_image": {"t_embedder.mlp.2": SILU},
}  # fmt: skip
GATED = ("flux2", "hidream", "lumina2", "sana", "sana_video", "z_image")  # the product of two halves


@pytest.fixture(scope="module", params=sorted(MADE))
def recorded(request) -> tuple[str, Target, Calibration]:
    name, model = request.param, small_model(request.param)
    sampler = Sampler(model.adapter.SAMPLERS[0], 2, 1.0)
    return name, model.target("all"), calibrate(model, sampler, n=1, seed=0, prompts=[Prompt("a red circle")])


class Kept(TorchFunctionMode):
    """The values that activations gave."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kind = {"gelu": GELU, "silu": SILU}.get(getattr(func, "__name__", ""))
        if kind:
            self.values.append((kind, in_order(result)))
        return result


def in_order(values: Tensor) -> Tensor:
    return values.float().flatten().sort().values


def by_values(target: Target, calibration: Calibration) -> dict[str, str]:
    """Layers whose input has the very numbers, in whatever order, that an activation gave."""
    kept, found = Kept(), {}

    def hook(name: str):
        def see(module: nn.Module, args: tuple) -> None:
            found[name] = next((k for k, values in kept.values if torch.equal(values, in_order(args[0]))), None)

        return see

    model = float_copy(target, dtype=torch.float32)
    for name, module in model.named_modules():
        if is_linear_map(module):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad(), kept:
        calibration.call(model, 0, calibration.rows(0, 1))
    return {name: kind for name, kind in found.items() if kind}


def test_the_readers_of_an_activation_are_those_whose_input_has_its_values(recorded):
    name, target, calibration = recorded
    found = activation_readers(target, calibration)
    assert found == by_values(target, calibration)
    assert BEHIND.get(name, {}).items() <= found.items()
    assert name not in GATED or GELU not in {kind for layer, kind in found.items() if "blocks." in layer}


class Odd(nn.Module):
    """One layer behind a GELU that was cast and reshaped, one behind its half, and three that read something else."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.part, self.sum, self.both, self.changed = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        active = F.gelu(x)
        first = self.kept(F.dropout(active, training=False).to(torch.float32).reshape(1, -1, 8))
        self.part(F.silu(torch.cat([x, x], -1))[..., :8])
        self.sum(active + 1)
        self.both(active)
        self.both(x)
        changed = F.silu(x.clone())
        changed.mul_(-1)
        self.changed(changed)
        return first


class OneCall(Calibration):
    def rows(self, step: int, wanted: int) -> list:
        return [self]

    def arguments(self) -> dict:
        return {"x": torch.ones(2, 3, 8)}


def test_what_is_computed_from_an_activation_is_no_activation():
    model = Odd()
    names = tuple(dict(model.named_children()))
    target = Target(model, names, tuple(Site(name, (name,)) for name in names))
    assert activation_readers(target, OneCall((), "one")) == {"kept": GELU, "part": SILU}
    assert not any(hasattr(parameter, "made_by") for parameter in model.parameters())


def test_without_data_nobody_can_say(small_target, small_calibration):
    with pytest.raises(UserError, match="calibration.n=0"):
        activation_readers(small_target, without_data(small_calibration, "method svdquant"))
