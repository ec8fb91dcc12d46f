"""The names of a transformer's linear layers: one for each that runs.

A layer may have several names. And where diffusers has fused q, k and v, the layers that were fused stay beside the one that runs,
with their weights; nothing calls them any more.
"""

from __future__ import annotations

from torch import nn

from ditbench.harness.quant.target import QUANTIZABLE

FUSED = {  # by diffusers, one of: layer → the layers whose rows it has, in order
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def aliases(model: nn.Module) -> dict[str, str]:
    """{other name of a layer: its first}, where one layer can be reached under several names: as one module, or as modules
    that share all their parameters.
    """
    first: dict[tuple, str] = {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QUANTIZABLE):
            own = first.setdefault((type(module), id(module.weight), id(module.bias)), name)
            if own != name:
                found[name] = own
    return found


def fused_layers(transformer: nn.Module) -> dict[str, tuple[str, slice]]:
    """{layer that is not called any more: (the fused layer, its rows there)}."""
    found = {}
    for prefix, module in transformer.named_modules():
        if not getattr(module, "fused_projections", False):
            continue
        for fused, parts in FUSED.items():
            if getattr(module, fused, None) is None:
                continue
            start = 0
            for part in parts:
                width = getattr(module, part).out_features
                found[f"{prefix}.{part}"] = (f"{prefix}.{fused}", slice(start, start + width))
                start += width
    return found


def linear_names(transformer: nn.Module) -> list[str]:
    """Every Linear and Conv2d that runs, by one name each, in the order in which they were made."""
    left_out = {*aliases(transformer), *fused_layers(transformer)}
    return [n for n, m in transformer.named_modules() if isinstance(m, QUANTIZABLE) and n not in left_out]


def carries_adapters(module: nn.Module) -> bool:
    """Whether a module has layers of peft in it, beside or around its own."""
    return any(type(part).__module__.startswith("peft.") for part in module.modules())
