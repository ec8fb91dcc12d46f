"""Words for naming the sites of a block: which layers read one tensor, and which rows make it."""

from __future__ import annotations

from harness.quant.target import AdaLNRows, Producer, Site, TableRows, ValueRows


def chunk(linear: str, width: int, shift: int, scale: int) -> AdaLNRows:
    """Chunks of an adaLN linear, each `width` rows long."""
    return AdaLNRows(linear, slice(shift * width, (shift + 1) * width), slice(scale * width, (scale + 1) * width))


def table(block: str, argument: str, shift: int, scale: int) -> TableRows:
    """Rows of a block's own scale_shift_table, added to an argument of the block."""
    return TableRows(block, "scale_shift_table", argument, shift, scale)


def reads(name: str, block: str, layers: tuple[str, ...], *producers: Producer) -> Site:
    """One tensor of a block and the layers that read it, named within the block."""
    return Site(f"{block}.{name}", tuple(f"{block}.{layer}" for layer in layers), producers)


def values(block: str, *linears: str) -> tuple[ValueRows, ...]:
    """The layers whose output attention averages."""
    return tuple(ValueRows(f"{block}.{linear}") for linear in linears)


QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
