"""What the tests of CLQ share."""

from __future__ import annotations

import torch

from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.methods import clq
from ditbench.methods.clq import Params

FAST = Params(probe=(0.5, 1.0), grid=5, lowest=0.4, search_samples=2, search_steps=2)
BLOCK, LAST = "transformer_blocks.0", "transformer_blocks.1"
BOTH = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_token", dynamic=True))
BOTH_STATIC = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_tensor", symmetric=False))
FLOAT = Bits(None, None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entered(target, calibration, bits, params, monkeypatch):
    """fit → {block: the hidden states it was calibrated on}."""
    seen = {}
    watch = BlockStream.watch

    def look(self, block, hooks):
        name = next(n for n, m in self.model.named_modules() if m is block)
        seen[name] = torch.cat([call.hidden_BTC for call in self.inputs]).clone()
        return watch(self, block, hooks)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStream, "watch", look)
        state = clq.fit(target, calibration, bits, params)
    return seen, state


def block_inputs(model, calibration, blocks):
    """The same from a whole run of a model."""
    seen = {name: [] for name in blocks}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0])) for n in blocks
    ]
    with torch.no_grad():
        for step, inputs in calibration.batches():
            model.clock.set(step, calibration.num_steps)
            model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
