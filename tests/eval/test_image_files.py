"""Image files of others: the pixels that come out are computed here without Pillow's conversions."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ditbench.eval.image_files import read_rgb
from ditbench.eval.reference import load_reference
from ditbench.harness.common.errors import UserError

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (4, 6), dtype=np.uint8)
COLOURS = RANDOM.integers(0, 256, (16, 3), dtype=np.uint8)
INDEX = RANDOM.integers(0, 16, (4, 6), dtype=np.uint8)
ORIENTATION = 0x0112


def with_alpha(least: int) -> Image.Image:
    alpha = np.full((4, 6, 1), 255, np.uint8)
    alpha[1, 2] = least
    return Image.fromarray(np.concatenate([RGB, alpha], axis=2))


def palette() -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(COLOURS.flatten().tolist())
    return image


def png_of_rows(path, depth: int, colour: int, rows: list[bytes]) -> None:
    """A PNG written by hand, since Pillow writes neither 16-bit RGB nor two-bit grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 6, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_eight_bit_rgb_comes_out_as_it_was_written(ending, tmp_path):
    Image.fromarray(RGB).save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert (read_rgb(tmp_path / f"a.{ending}") == RGB).all()


def test_grey_becomes_three_equal_channels(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png") == np.stack([GREY] * 3, axis=2)).all()


def test_one_and_two_bit_grey_fill_the_range_to_255(tmp_path):
    Image.fromarray(GREY > 127).save(tmp_path / "one.png")
    assert (read_rgb(tmp_path / "one.png")[..., 0] == np.where(GREY > 127, 255, 0)).all()
    png_of_rows(tmp_path / "two.png", 2, 0, [bytes([0b00011011, 0b11100000])])  # 0 1 2 3 3 2
    assert read_rgb(tmp_path / "two.png")[0, :, 1].tolist() == [0, 85, 170, 255, 255, 170]


def test_a_palette_image_has_its_palettes_colours(tmp_path):
    palette().save(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png") == COLOURS[INDEX]).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, upright, ending, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path, plain = tmp_path / f"a.{ending}", tmp_path / f"plain.{ending}"
    settings = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(RGB).save(path, exif=exif, **settings)
    Image.fromarray(RGB).save(plain, **settings)
    assert (read_rgb(path) == upright(read_rgb(plain))).all()


def test_a_turned_image_counts_as_the_size_it_is_seen_in(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(RGB, -1).copy()).save(tmp_path / "b.png")
    images = load_reference(tmp_path).images_NHWC[:]
    assert images.shape == (2, 6, 4, 3) and (images[0] == images[1]).all()


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_alpha_that_is_opaque_everywhere_is_dropped_and_moves_no_colour(ending, tmp_path):
    with_alpha(255).save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert (read_rgb(tmp_path / f"a.{ending}") == RGB).all()


def test_a_palette_whose_transparent_colour_is_not_used_is_opaque(tmp_path):
    image = palette()
    image.save(tmp_path / "unused.png", transparency=200)
    assert (read_rgb(tmp_path / "unused.png") == COLOURS[INDEX]).all()


def animated(path):
    frames = [Image.fromarray(frame) for frame in (RGB, 255 - RGB)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def transparent_text(path):
    Image.fromarray(RGB).save(path, transparency=tuple(int(level) for level in RGB[0, 0]))


REFUSED = {
    "alpha.png": (lambda path: with_alpha(254).save(path), "alpha down to 254 of 255 (mode RGBA)"),
    "alpha.webp": (lambda path: with_alpha(7).save(path, lossless=True, exact=True), "alpha down to 7 of 255"),
    "grey_alpha.png": (lambda path: Image.fromarray(np.stack([GREY, GREY // 2], 2)).save(path), "(mode LA)"),
    "palette.png": (
        lambda path: palette().save(path, transparency=int(INDEX[0, 0])),
        "alpha down to 0 of 255 (mode P)",
    ),
    "colour.png": (transparent_text, "alpha down to 0 of 255 (mode RGB)"),
    "sixteen.png": (lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), "16 bits a channel"),
    "cmyk.jpg": (lambda path: Image.new("CMYK", (6, 4), (9, 8, 7, 6)).save(path), "mode CMYK"),
    "animated.webp": (animated, "2 frames"),
    "animated.png": (animated, "2 frames"),
    "rgb16.png": (lambda path: png_of_rows(path, 16, 2, [bytes(range(36))]), "16 bits a channel (mode RGB)"),
    "rgba16.png": (lambda path: png_of_rows(path, 16, 6, [b"\xff" * 48]), "16 bits a channel (mode RGBA)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_one_conversion_is_refused_with_its_file_what_it_is_and_what_to_do(name, tmp_path):
    write, what = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_reference(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name) in message and what in message and "convert it to 8-bit RGB" in message


def test_an_image_in_the_middle_of_a_folder_is_refused_as_the_first_is(tmp_path):
    for name in "abd":
        Image.fromarray(RGB).save(tmp_path / f"{name}.png")
    with_alpha(3).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c\.png: .*alpha down to 3"):
        load_reference(tmp_path)


@pytest.mark.parametrize("name", ["b.tif", "deeper/b.GIF"])
def test_an_image_of_a_kind_that_is_not_read_is_named_and_not_left_out(name, tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(GREY).save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: expected images of .*png.* only"):
        load_reference(tmp_path)


def test_a_tiff_called_png_is_no_image(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(UserError, match=r"a\.png: expected an image, came UnidentifiedImageError"):
        read_rgb(tmp_path / "a.png")


def test_of_a_phones_jpeg_with_several_pictures_the_first_is_read(tmp_path):
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    first.save(tmp_path / "several.jpg", format="MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "plain.jpg")
    assert (read_rgb(tmp_path / "several.jpg") == read_rgb(tmp_path / "plain.jpg")).all()


def test_a_png_with_text_and_a_colour_profile_keeps_its_levels(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("prompt", "a cat")
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=about, icc_profile=b"not a profile")
    assert (read_rgb(tmp_path / "a.png") == RGB).all()
