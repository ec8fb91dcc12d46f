from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.spec import bits_of
from ditbench.harness.quant.transforms import Hadamard, RegularHadamard
from ditbench.methods import convrot, rtn
from ditbench.methods.convrot import Params

LAYER = "transformer_blocks.1.ff.net.2"  # 192 channels: groups of 64


def recipe_of(target, calibration, bits=DYNAMIC, params=Params()):
    return convrot.apply(target, convrot.fit(target, calibration, bits, params), bits, params)


def kronecker_power(order: int) -> torch.Tensor:
    """H₄ ⊗ H₄ ⊗ … entry by entry: in base 4 the digits of row and column pick one entry each, and these are multiplied."""
    base = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

    def entry(row: int, column: int) -> int:
        value = 1
        for _ in range(round(torch.log2(torch.tensor(float(order))).item() / 2)):
            value *= base[row % 4][column % 4]
            row, column = row // 4, column // 4
        return value

    return torch.tensor([[entry(r, c) for c in range(order)] for r in range(order)], dtype=torch.float64)


@pytest.mark.parametrize("asked", [16, 256])
def test_a_layer_computes_the_product_of_both_rotated_sides(asked, small_target, small_calibration, normal):
    """Token by token and group by group in float64: y = Q₈(X R) Q₄(W R)ᵀ + b, each side with its own largest value."""
    layer = quant_layers(
        build(
            small_target,
            recipe_of(small_target, small_calibration, params=Params(block_size=asked)),
            dtype=torch.float64,
        )
    )[LAYER]
    group = min(asked, 64)
    rotation = kronecker_power(group) / group**0.5
    x, linear = normal(5, 192), small_target.module(LAYER)

    def turned_and_rounded(rows: torch.Tensor, largest_code: int) -> torch.Tensor:
        rounded = torch.zeros_like(rows)
        for index, row in enumerate(rows):
            turned = torch.cat([part @ rotation for part in row.split(group)])
            scale = turned.abs().max().float().double() / largest_code
            rounded[index] = (turned / scale).round().clamp(-largest_code, largest_code) * scale
        return rounded

    expected = turned_and_rounded(x, 127) @ turned_and_rounded(linear.weight.double(), 7).T + linear.bias.double()
    assert relative_error(layer(x), expected) < 1e-5


def test_what_all_channels_share_stays_spread_and_another_matrix_gathers_it():
    """The paper's row-wise outlier: a token of one value in every channel."""
    x = torch.ones(1, 512, dtype=torch.float64)
    regular, standard = (convrot.rotation(512, Params(hadamard=kind))[0](x).abs() for kind in ("regular", "standard"))
    assert torch.equal(regular, torch.ones_like(regular))
    assert float(standard.max()) > 5.0


@pytest.mark.parametrize(
    ("width", "asked", "taken"), [(192, 256, 64), (192, 16, 16), (3072, 256, 256), (48, 256, 16), (1152, 256, 64)]
)
def test_groups_are_the_largest_power_of_four_that_divides_the_width(width, asked, taken):
    (regular,), (standard,) = (
        convrot.rotation(width, Params(block_size=asked, hadamard=kind)) for kind in ("regular", "standard")
    )
    assert isinstance(regular, RegularHadamard) and isinstance(standard, Hadamard)
    assert regular.block_size == standard.block_size == taken


def test_a_width_that_four_does_not_divide_is_not_rotated():
    assert convrot.rotation(90, Params()) == ()


def test_rotations_run_online_take_no_bytes_and_need_no_data(small_target, small_calibration):
    assert convrot.fit(small_target, small_calibration, DYNAMIC, Params()) == {}
    recipe = recipe_of(small_target, small_calibration)
    assert not recipe.folded and not any(layer.transform.state_dict() for layer in recipe.layers.values())
    for site in small_target.sites:
        assert len({id(recipe.layers[name].transform) for name in site.consumers}) == 1


def test_static_ranges_are_those_of_the_rotated_input(small_target, small_calibration):
    plain = rtn.fit(small_target, small_calibration, STATIC, rtn.Params())
    rotated = convrot.fit(small_target, small_calibration, STATIC, Params())
    assert not torch.allclose(plain[f"{LAYER}/act_high"], rotated[f"{LAYER}/act_high"], rtol=1e-3)


def test_the_published_form_gives_8_bits_to_the_attentions_output(small_target, small_calibration):
    params = Params(**convrot.FORMS["published"].params)
    recipe = recipe_of(small_target, small_calibration, bits_of("w4a4"), params)
    widths = {name: (layer.weight.spec.bits, layer.act.spec.bits) for name, layer in recipe.layers.items()}
    assert {name for name, each in widths.items() if each == (8, 8)} == {
        f"transformer_blocks.{block}.attn1.to_out.0" for block in range(2)
    }
    assert set(widths.values()) == {(8, 8), (4, 4)}
    floats = recipe_of(small_target, small_calibration, bits_of("nvfp4"), params)
    assert {layer.weight.spec for layer in floats.layers.values()} == {bits_of("nvfp4").weight}


def test_integers_in_blocks_have_8_bits_there_too_in_blocks_of_their_own(small_target, small_calibration):
    params, bits = Params(wide=r"to_out\.0$"), bits_of("int4_g64")
    recipe = recipe_of(small_target, small_calibration, bits, params)
    for name, layer in recipe.layers.items():
        width = 8 if name.endswith("to_out.0") else 4
        assert (layer.weight.spec, layer.act.spec) == (replace(bits.weight, bits=width), replace(bits.act, bits=width))


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("transformer_blocks.3.attn.to_out.0", True),
        ("transformer_blocks.3.attn.to_add_out", True),
        ("single_transformer_blocks.11.attn.to_v", True),
        ("transformer_blocks.3.attn.to_v", False),
        ("single_transformer_blocks.11.proj_out", False),
    ],
)
def test_fluxs_layers_at_8_bits_are_those_that_its_table_names(name, wide):
    assert bool(convrot.re.search(convrot.WIDE_OF_FLUX, name)) == wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 128}, "block_size must be a power of four"),
        ({"hadamard": "random"}, "hadamard must be one of"),
        ({"wide": "(to_v"}, "is not a regular expression"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
