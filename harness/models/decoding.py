"""How a VAE decodes where memory is scarce: a whole batch, one sample at a time (sliced), or each sample in tiles.

Whole until that does not fit: by an estimate against the memory that is free, or because it was tried and ran out. Slices are the
same pixels but for rounding; tiles are blended where they meet, which can be seen. What a pipeline was found to need it keeps,
and `decoded` says it for the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ditbench.harness.common.batches import out_of_memory, release
from ditbench.harness.common.memory import free_memory

WHOLE, SLICED, TILED = "whole", "sliced", "tiled"
WAYS = (WHOLE, SLICED, TILED)
SWITCHES = {SLICED: ("enable_slicing", "use_slicing"), TILED: ("enable_tiling", "use_tiling")}
# Of the widest feature map, at the size of the pixels: held at once by a residual block (input, norm, activation, convolution's
# workspace and output).
MAPS = 5
FRAMES = 8  # of a video: many VAEs go through it some frames at a time; whoever needs more is tried, and runs out
ROOM = 0.8  # of free memory that a decode may take

_found: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # vae → what `decoded` says


def decoded(vae: nn.Module | None) -> dict[str, Any]:
    """For the record: {"vae": whole | sliced | tiled, "because": why not whole, "tile": pixels}; empty if nothing was decoded."""
    return dict(_found.get(vae, {})) if vae is not None else {}


def forget_decoding(vae: nn.Module) -> None:
    """The next decode is tried whole again."""
    _found.pop(vae, None)


def decode_within_memory(vae: nn.Module, decode: Callable[..., Any], latents: Tensor, *args: Any, **kwargs: Any) -> Any:
    """decode(latents, …) of this VAE, which is on the latents' device: whole, sliced or tiled.

    Raises whatever decode does; out of memory only if tiles do not fit either.
    """
    device = latents.device
    ways = [way for way in WAYS if way == WHOLE or hasattr(vae, SWITCHES[way][0])]
    known = _found.setdefault(vae, {"vae": WHOLE})
    ways = ways[ways.index(known["vae"]) if known["vae"] in ways else 0 :]
    needed, free = decode_bytes(vae, latents), free_memory(device)
    if ways[0] == WHOLE and free is not None and needed > ROOM * free and len(ways) > 1:
        one_fits = needed <= ROOM * free * len(latents)
        ways = ways[1:] if one_fits or TILED not in ways else [TILED]
        known["because"] = f"an estimate of {needed / 2**30:.1f} GiB for {len(latents)} of {free / 2**30:.1f} GiB free"
    for way in ways:
        known["vae"] = way
        try:
            with switched(vae, way):
                return decode(latents, *args, **kwargs)
        except Exception as error:
            if way == ways[-1] or not out_of_memory(error):
                raise
        known["because"] = f"{way} ran out of memory"
        release(device)
    raise AssertionError("the last way returns or raises")


@contextmanager
def switched(vae: nn.Module, way: str) -> Iterator[None]:
    """Its slicing and tiling for one decode; then as they were."""
    wanted = WAYS[1 : WAYS.index(way) + 1]
    before = {flag: getattr(vae, flag) for _, flag in SWITCHES.values() if hasattr(vae, flag)}
    for each in wanted:
        if hasattr(vae, SWITCHES[each][0]):
            getattr(vae, SWITCHES[each][0])()
    try:
        yield
    finally:
        for flag, value in before.items():
            setattr(vae, flag, value)


def decode_bytes(vae: nn.Module, latents: Tensor) -> int:
    """About what decoding all of them at once holds: some maps of the widest channels that the decoder has at full size."""
    config: Any = getattr(vae, "config", {})
    widths = (
        config.get("decoder_block_out_channels") or config.get("block_out_channels") or (config.get("base_dim", 128),)
    )
    widest = sorted(widths)[:2][-1]  # the last upsampling block starts with the width of the one before
    scale = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio") or 2 ** (len(widths) - 1)
    frames = min(FRAMES, latents.shape[2]) if latents.ndim == 5 else 1
    pixels = latents.shape[-1] * latents.shape[-2] * scale**2 * frames
    return len(latents) * pixels * widest * MAPS * next(vae.parameters()).element_size()
