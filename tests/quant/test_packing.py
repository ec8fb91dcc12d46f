from __future__ import annotations

import pytest
import torch

from ditbench.harness.quant.packing import pack, unpack

BITS = range(2, 9)


def codes_of(rows: int, width: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, width), generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 16, 17, 48, 1152])
def test_codes_survive_packing_in_exactly_so_many_bytes(bits, width):
    codes = codes_of(5, width, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, width if bits == 8 else -(-width // 8) * bits)
    assert torch.equal(unpack(packed, bits, width).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_at_every_position(bits):
    codes = torch.stack([torch.arange(2**bits).roll(shift) for shift in range(8)])
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]).long(), codes)


def test_the_first_code_lies_in_the_lowest_bits():
    """The layout is part of the stored format."""
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x21, 0x43, 0x65, 0x87]]
    assert pack(torch.tensor([[1, 2, 3, 0, 1, 2, 3, 0]]), 2).tolist() == [[0b00111001, 0b00111001]]
    assert pack(torch.tensor([[7, 0, 0, 0, 0, 0, 0, 1]]), 3).tolist() == [[0b111, 0, 0b00100000]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", ["below", "above"])
def test_a_code_out_of_range_is_refused(bits, wrong):
    codes = codes_of(2, 8, bits)
    codes[1, 3] = -1 if wrong == "below" else 2**bits
    with pytest.raises(ValueError, match=f"expected 0…{2**bits - 1}"):
        pack(codes, bits)
