"""Words for naming the sites of a block: which layers read one tensor, and which rows make it."""

from __future__ import annotations

from dataclasses import replace

from ditbench.harness.quant.target import AdaLNRows, Producer, Site, TableRows, ValueRows


def chunk(linear: str, width: int, shift: int, scale: int) -> AdaLNRows:
    """Chunks of an adaLN linear, each `width` rows long."""
    return AdaLNRows(linear, slice(shift * width, (shift + 1) * width), slice(scale * width, (scale + 1) * width))


def table(block: str, argument: str, shift: int, scale: int) -> TableRows:
    """Rows of a block's own scale_shift_table, added to an argument of the block."""
    return TableRows(block, "scale_shift_table", argument, shift, scale)


def shared(block: str, argument: str, shift: int, scale: int) -> TableRows:
    """Rows of an argument of the block, of which all blocks get the same: rewritten at the input of each."""
    return TableRows(block, "", argument, shift, scale)


def reads(name: str, block: str, layers: tuple[str, ...], *producers: Producer) -> Site:
    """One tensor of a block and the layers that read it, named within the block."""
    return Site(f"{block}.{name}", tuple(f"{block}.{layer}" for layer in layers), producers)


def reads_apart(name: str, block: str, layers: tuple[str, ...], *producers: Producer) -> Site:
    """The same where each of the layers reads its own part of the tensor (image tokens, text tokens)."""
    site = reads(name, block, layers, *producers)
    return replace(site, groups=tuple((layer,) for layer in site.consumers))


def values(block: str, *linears: str) -> tuple[ValueRows, ...]:
    """The layers whose output attention averages."""
    return tuple(ValueRows(f"{block}.{linear}") for linear in linears)


QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def text_cross_attention(blocks: str, depth: int, *, modulation: str = "temb", feed_forward: str = "ff") -> list[Site]:
    """Blocks of self-attention, cross-attention and feed-forward, modulated by rows of their own table (PixArt, LTX, Wan).

    modulation: the argument of the block that its table is added to. feed_forward: what the block calls it.
    """
    found = []
    for block in (f"{blocks}.{index}" for index in range(depth)):
        found += [
            reads("attn_in", block, QKV, table(block, modulation, 0, 1)),
            reads("attn_out", block, ("attn1.to_out.0",), *values(block, "attn1.to_v")),
            reads("cross_query", block, ("attn2.to_q",)),
            reads("caption", block, ("attn2.to_k", "attn2.to_v")),
            reads("cross_out", block, ("attn2.to_out.0",), *values(block, "attn2.to_v")),
            reads("ff_in", block, (f"{feed_forward}.net.0.proj",), table(block, modulation, 3, 4)),
            reads("ff_mid", block, (f"{feed_forward}.net.2",)),
        ]
    return found
