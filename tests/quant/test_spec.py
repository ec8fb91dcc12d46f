from __future__ import annotations

import pytest

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.spec import (
    NAMED,
    Bits,
    Format,
    QuantSpec,
    all_labels,
    bits_of,
    label_bits,
    needs_integers,
    parse_label,
)


def integers(weight: int, act: int) -> Format:
    return Format({"bits": weight, "number": "int"}, {"bits": act, "number": "int"})


@pytest.mark.parametrize(
    ("label", "widths"), [("w4a8", (4, 8)), ("W8A8", (8, 8)), ("w3a4", (3, 4)), ("w4a16", (4, 16)), ("w16a2", (16, 2))]
)
def test_a_label_gives_both_widths(label, widths):
    assert parse_label(label) == integers(*widths)


@pytest.mark.parametrize("label", ["fp8", "FP8"])
def test_fp8_is_eight_bits_of_e4m3_on_both_sides(label):
    sides = parse_label(label).sides()
    assert sides == {side: {"bits": 8, "number": "e4m3"} for side in ("weight", "act")}
    bits = Bits(
        QuantSpec(granularity="per_channel", **sides["weight"]), QuantSpec(granularity="per_token", **sides["act"])
    )
    assert bits.label == "FP8"
    assert (bits.weight.quant_min, bits.weight.quant_max) == (-448, 448)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 4}, "got 4 bits"),
        ({"symmetric": False}, "no zero point.*symmetric=false"),
        ({"number": "e5m1"}, "'e5m1' is none of int, e4m3"),
    ],
    ids=str,
)
def test_e4m3_has_eight_bits_and_no_zero_point(values, words):
    with pytest.raises(UserError, match=words):
        QuantSpec(**({"bits": 8, "granularity": "per_channel", "number": "e4m3"} | values))


def test_what_is_about_integers_refuses_e4m3_on_either_side_and_nothing_else():
    integers, e4m3 = QuantSpec(8, "per_channel"), QuantSpec(8, "per_channel", number="e4m3")
    needs_integers("somebody", integers, None)
    for specs in ((e4m3,), (integers, e4m3), (None, e4m3)):
        with pytest.raises(UserError, match="somebody is about integer codes, and bits=fp8 has none"):
            needs_integers("somebody", *specs)
    with pytest.raises(UserError, match="bits=int4_g64 has scales per block, which it does not fit"):
        needs_integers("somebody", bits_of("int4_g64").weight)


@pytest.mark.parametrize("label", ["", "w4", "a8", "4a8", "w4a8x", "xw4a8", "w-4a8", "w4.5a8", "w4 a8"])
def test_a_malformed_label_is_refused_with_an_example(label):
    with pytest.raises(UserError, match=r"^no bits .* known: w<bits>a<bits> such as w8a8"):
        parse_label(label)


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ("nvfp5", "nvfp4"),
        ("nv_fp4", "nvfp4"),
        ("fp4", "nvfp4 or mxfp4"),
        ("MX-FP8", "mxfp8"),
        ("wnvfp4afp8", "wnvfp4_afp8"),
        ("w4-a4", "w4a4"),
    ],
)
def test_a_label_that_is_spelled_otherwise_comes_with_the_one_that_is_meant(label, meant):
    with pytest.raises(UserError, match=rf"^no bits '{label}'; did you mean {meant}\? known"):
        parse_label(label)


def test_a_label_like_none_has_no_guess():
    with pytest.raises(UserError, match=r"^no bits 'qx16'; known"):
        parse_label("qx16")


@pytest.mark.parametrize(
    ("label", "side"), [("w1a8", "weights"), ("w9a8", "weights"), ("w4a32", "activations"), ("w4a0", "activations")]
)
def test_a_width_that_does_not_exist_is_refused_naming_its_side(label, side):
    with pytest.raises(UserError, match=side):
        parse_label(label)


def test_every_listed_label_parses_and_none_is_listed_twice():
    labels = all_labels()
    widths = (2, 3, 4, 5, 6, 7, 8, 16)
    plain = [f"w{w}a{a}" for w in widths for a in widths]
    assert labels[: len(plain)] == plain and [parse_label(each) for each in plain] == [
        integers(w, a) for w in widths for a in widths
    ]
    assert len(set(labels)) == len(labels) == len(plain) + (len(NAMED) + len(widths)) ** 2 - len(widths) ** 2
    for label in labels:
        assert bits_of(label).label.lower() == label, "a record's label is one that a run takes"
        bits_of(label).check_sides()


def test_a_label_says_bits_with_the_scales_of_blocks():
    said = {"w4a8": (4, 8), "fp8": (8, 8), "nvfp4": (4.5, 4.5), "wmxfp4_a16": (4.25, 16), "int4_g128": (4.125, 4.125)}
    assert {label: label_bits(label) for label in said} == said
    assert label_bits("fp8_block") == (8 + 32 / 128**2, 8 + 32 / 128) and label_bits("mixed-4.5") is None


def test_a_mixture_has_the_settings_of_each_side_and_activations_have_no_rows_to_share():
    weight, act = parse_label("wfp8_block_anvfp4")
    assert weight == NAMED["fp8_block"] and act == NAMED["nvfp4"]
    assert "block_rows" not in parse_label("fp8_block").act
    assert parse_label("w4_amxfp8").weight == {"bits": 4, "number": "int"}
    for label in ("wnvfp5_a8", "wfp8_a4bit"):
        with pytest.raises(UserError, match="cannot be 'nvfp5'; known: fp8, nvfp4|cannot be '4bit'"):
            parse_label(label)
    with pytest.raises(UserError, match="activations cannot have 9 bits"):
        parse_label("wnvfp4_a9")


@pytest.mark.parametrize(
    ("bits", "symmetric", "ends"),
    [(8, True, (-127, 127)), (4, True, (-7, 7)), (2, True, (-1, 1)), (8, False, (0, 255)), (3, False, (0, 7))],
)
def test_the_integer_range_follows_from_width_and_symmetry(bits, symmetric, ends):
    spec = QuantSpec(bits, "per_tensor", symmetric)
    assert (spec.quant_min, spec.quant_max) == ends


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_a_quantized_side_has_two_to_eight_bits(bits):
    with pytest.raises(UserError, match="2 to 8 bits"):
        QuantSpec(bits, "per_channel")


def test_an_unknown_granularity_is_refused_naming_those_there_are():
    with pytest.raises(UserError, match="channel_wise.*per_channel"):
        QuantSpec(4, "channel_wise")


@pytest.mark.parametrize(("granularity", "group_size"), [("per_group", None), ("per_channel", 64)])
def test_a_group_size_goes_with_per_group_and_only_with_it(granularity, group_size):
    with pytest.raises(UserError, match="group_size"):
        QuantSpec(4, granularity, group_size=group_size)


def test_a_group_size_that_does_not_fit_is_refused_with_the_layer_and_sizes_that_do():
    spec = QuantSpec(4, "per_group", group_size=256)
    with pytest.raises(UserError) as error:
        spec.check_width("blocks.3.mlp.fc1", 1152)
    message = str(error.value)
    assert "blocks.3.mlp.fc1" in message and "256" in message and "C=1152" in message
    advised = [int(size) for size in message.split("try ")[1].split(", ")]
    assert {128, 192, 288} <= set(advised) and all(1152 % size == 0 for size in advised)


def test_a_group_size_that_fits_passes():
    QuantSpec(4, "per_group", group_size=128).check_width("blocks.3.mlp.fc1", 1152)


def test_a_width_without_usual_divisors_is_still_refused_with_words():
    with pytest.raises(UserError, match="no usual divisor"):
        QuantSpec(4, "per_group", group_size=16).check_width("embed", 7)


def test_the_printed_label_says_16_for_a_float_side():
    weight = QuantSpec(4, "per_channel")
    assert Bits(weight, None).label == "W4A16"
    assert Bits(None, QuantSpec(8, "per_token", dynamic=True)).label == "W16A8"


def test_other_widths_keep_granularity_and_float_sides():
    bits = Bits(QuantSpec(4, "per_group", symmetric=False, group_size=32), None).with_widths(8, 6)
    assert bits.weight == QuantSpec(8, "per_group", symmetric=False, group_size=32)
    assert bits.act is None
