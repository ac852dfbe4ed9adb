"""Every trap between the bytes of a picture and its pixels, each with the pixels that are right."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ldm import images
from ldm.images import (
    EXIF_ORIENTATION,
    UPRIGHT,
    ImageError,
    decode_rgb,
    decode_small,
    decoded_part,
    encode_jpeg,
    encode_png,
    image_grid,
    resize_and_crop,
    resize_shorter,
    to_rgb,
    to_tensor,
    without_notes,
)

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))


def save(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format, **options)  # type: ignore[arg-type]
    return sink.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, 256, (height, width, channels), np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand: Pillow writes no 16-bit colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))  # fmt: skip


# -- orientation ------------------------------------------------------------------------------------------------------
STORED = {  # EXIF orientation -> how an upright picture lies in the file (CIPA DC-008, table 6)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation: int, format: str) -> None:
    upright, exif = noise(5, 9), Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = save(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(decode_rgb(data), upright)


AVIF = pytest.mark.skipif("AVIF" not in images.FORMATS, reason="this Pillow reads no AVIF")


def quadrants(height: int, width: int) -> np.ndarray:
    """Four plain colours, which lossy formats keep."""
    colours = np.array([[[220, 30, 30], [30, 200, 40]], [[40, 60, 210], [240, 220, 60]]], np.uint8)
    return colours.repeat(height // 2, 0).repeat(width // 2, 1)


@AVIF
@pytest.mark.parametrize("orientation", STORED)
def test_avif_comes_out_upright(orientation: int) -> None:
    upright, exif = quadrants(32, 48), Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    pixels = decode_rgb(save(stored, "AVIF", quality=95, subsampling="4:4:4", exif=exif))
    assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).mean() < 4


def test_without_the_table_of_orientations_the_same_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "UPRIGHT", {})
    with pytest.raises(AssertionError):
        test_every_exif_orientation_comes_out_upright(6, "PNG")


def test_a_turned_jpeg_has_its_sides_exchanged_and_a_broken_note_does_no_harm() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture = Image.fromarray(noise(16, 40))
    assert decode_rgb(save(picture, "JPEG", exif=exif)).shape == (40, 16, 3)
    broken = save(picture, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_rgb(broken).shape == (16, 40, 3)
    exif[EXIF_ORIENTATION] = 0
    assert 0 not in UPRIGHT and decode_rgb(save(picture, "JPEG", exif=exif)).shape == (16, 40, 3)


# -- depth ------------------------------------------------------------------------------------------------------------
def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 25_700, 32_896, 65_278, 65_535]], np.uint16)
    expected = [0, 1, 100, 128, 254, 255]
    data = save(Image.fromarray(levels))
    assert decode_rgb(data)[0].tolist() == [[level] * 3 for level in expected]
    with Image.open(io.BytesIO(data)) as picture:  # the sabotage twin: what a plain convert() makes of it
        assert np.asarray(picture.convert("RGB"))[0, 2].tolist() != [100] * 3


def test_16_bit_colour_with_alpha_is_scaled_and_laid_over() -> None:
    row = struct.pack(">8H", 65_535, 257, 25_700, 65_535, 65_535, 0, 0, 32_896)
    data = png(2, 1, 16, 6, b"\x00" + row)
    assert decode_rgb(data)[0].tolist() == [[255, 1, 100], [255, 127, 127]]
    assert decode_rgb(data, background=(0, 0, 0))[0].tolist() == [[255, 1, 100], [128, 0, 0]]


def test_a_see_through_level_of_16_bit_grey() -> None:
    body = b"tRNS" + struct.pack(">H", 100)
    extra = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    data = png(2, 1, 16, 0, b"\x00" + struct.pack(">2H", 100, 25_700), extra)
    assert decode_rgb(data, background=(9, 8, 7))[0].tolist() == [[9, 8, 7], [100, 100, 100]]


def test_grey_two_levels_and_grey_with_alpha() -> None:
    grey = np.array([[0, 77, 255]], np.uint8)
    assert decode_rgb(save(Image.fromarray(grey)))[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]
    assert decode_rgb(save(Image.fromarray(grey == 77)))[0].tolist() == [[0] * 3, [255] * 3, [0] * 3]
    both = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(np.array([[255, 0, 255]], np.uint8))))
    assert decode_rgb(save(both))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


# -- alpha and palettes -----------------------------------------------------------------------------------------------
def test_straight_alpha_over_the_background_hidden_colours_do_not_show() -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 51], [255, 0, 255, 0]]], np.uint8)
    data = save(Image.fromarray(pixels))
    assert decode_rgb(data)[0].tolist() == [[200, 100, 0], [244, 224, 204], [255, 255, 255]]
    assert decode_rgb(data, background=(10, 20, 30))[0].tolist() == [[200, 100, 0], [48, 36, 24], [10, 20, 30]]


def test_palette_with_alpha() -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = save(picture, transparency=bytes([255, 0, 51]))
    assert decode_rgb(data)[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 255]]


def test_first_frame_of_moving_pictures_and_the_see_through_colour_of_a_gif() -> None:
    red, blue = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 255))
    for format in ("GIF", "WEBP"):
        exact = {"lossless": True} if format == "WEBP" else {}
        data = save(red, format, save_all=True, append_images=[blue], **exact)
        assert decode_rgb(data).shape == (6, 8, 3) and (decode_rgb(data) == (255, 0, 0)).all()
    hole = np.full((6, 8, 4), (255, 0, 0, 255), np.uint8)
    hole[:3] = 0
    assert decode_rgb(save(Image.fromarray(hole), "GIF"), background=(1, 2, 3))[:, 0].tolist() == (
        [[1, 2, 3]] * 3 + [[255, 0, 0]] * 3
    )


# -- colour -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inks, expected", [
    ((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)),
    ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 128), (127, 127, 127)),
])  # fmt: skip
def test_cmyk_jpeg_is_not_inverted(inks: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = save(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    assert np.abs(decode_rgb(data).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (30, 200, 90), (0, 0, 0)])
def test_ycck_jpeg(colour: tuple[int, int, int]) -> None:
    """YCCK is CMYK whose first three inks are stored as luma and chroma (ITU-T T.871); the Adobe marker says which."""
    cyan, magenta, yellow = (255 - level for level in colour)
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    stored = (luma, 128 + (yellow - luma) / 1.772, 128 + (cyan - luma) / 1.402, 255)
    inverted = tuple(round(255 - level) for level in stored)  # what Pillow inverts again as it writes CMYK
    data = bytearray(save(Image.new("CMYK", (16, 16), inverted), "JPEG", quality=100))
    at = data.index(b"Adobe") + 11
    assert data[at] == 0  # as Pillow writes it: plain CMYK
    data[at] = 2  # YCCK
    assert np.abs(decode_rgb(bytes(data)).astype(int) - colour).max() <= 3


def test_a_colour_profile_is_converted_to_srgb_and_a_senseless_one_is_left_out() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(6, 7)
    same = decode_rgb(save(Image.fromarray(pixels), icc_profile=srgb))
    assert np.abs(same.astype(int) - pixels).max() <= 1
    assert np.array_equal(decode_rgb(save(Image.fromarray(pixels), icc_profile=b"no profile")), pixels)
    swapped = decode_rgb(save(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=_green_is_red()))
    assert swapped[0, 0, 1] > 200 and swapped[0, 0, 0] < 60, "a profile whose red is green"


def test_a_profile_that_says_srgb_costs_nothing_and_changes_nothing() -> None:
    pixels = photograph(64, 64)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_rgb(save(Image.fromarray(pixels), icc_profile=srgb)), pixels)


def test_a_profile_leaves_alpha_alone() -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    out = decode_rgb(save(Image.fromarray(pixels), icc_profile=_green_is_red()), background=(1, 2, 3))
    assert out[0, 0, 1] > 200 and out[0, 1].tolist() == [1, 2, 3]


def test_a_profile_of_grey_holds_also_beside_alpha() -> None:
    grey, alpha = Image.new("L", (2, 1), 128), Image.fromarray(np.array([[255, 0]], np.uint8))
    profile = _linear_grey()
    expected = decode_rgb(save(grey, icc_profile=profile))[0, 0]
    assert expected.tolist() == [188] * 3, "half of the light is level 188 in sRGB"
    both = decode_rgb(save(Image.merge("LA", (grey, alpha)), icc_profile=profile))
    assert both[0].tolist() == [expected.tolist(), [255] * 3]


def _linear_grey() -> bytes:
    """A grey profile with a linear curve, by hand (ICC.1:2004): header, table of tags, white point and curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)  # D50 in 16.16
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = [(b"wtpt", 156, white), (b"kTRC", 176, curve)]
    table = struct.pack(">I", 2) + b"".join(name + struct.pack(">II", at, len(body)) for name, at, body in tags)
    body = table + white + curve
    header = struct.pack(">I4sI4s4s4s12s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", bytes(12),
                         b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + body


def _green_is_red() -> bytes:
    """An sRGB profile with the colorants of red and green exchanged: the names in its table of tags."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmpX", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmpX", b"gXYZ", 1)


# -- what is no picture -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", pytest.param("AVIF", marks=AVIF)])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_picture_that_ends_early_is_refused(format: str, share: float) -> None:
    data = save(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(ImageError) as raised:
        decode_rgb(data[: int(len(data) * share)])
    assert raised.value.reason == "truncated"


def test_where_pillow_is_told_to_be_lenient_the_same_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(pytest.fail.Exception):
        test_a_picture_that_ends_early_is_refused("JPEG", 0.6)


@pytest.mark.parametrize("data, reason", [
    (b"", "not_an_image"),
    (b"<!doctype html><title>404</title>", "not_an_image"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF", "truncated"),
    (b"GIF89a", "broken"),
    (save(Image.new("RGB", (4, 4)), "BMP"), "not_an_image"),  # a picture, but not of a format that is let in
    (save(Image.new("RGB", (4, 4)), "TIFF"), "not_an_image"),
])  # fmt: skip
def test_what_is_no_picture_is_refused_by_one_word(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as raised:
        decode_rgb(data)
    assert raised.value.reason == reason


@pytest.mark.parametrize("side", [4_001, 12_000, 30_000])
def test_too_many_pixels_are_refused_from_the_header(side: int) -> None:
    bomb = png(side, side, 8, 0, zlib.compress(b""))
    with pytest.raises(ImageError) as raised:
        decode_rgb(bomb, max_pixels=16_000_000)
    assert raised.value.reason == "too_many_pixels" and len(bomb) < 200


def test_random_damage_gives_a_picture_or_an_image_error() -> None:
    rng = np.random.default_rng(SEED)
    for format in images.FORMATS:
        whole = np.frombuffer(save(Image.fromarray(noise(24, 24)), format), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode_rgb(data.tobytes(), max_pixels=10**6).dtype == np.uint8
            except ImageError as error:
                assert error.reason in ("not_an_image", "too_many_pixels", "truncated", "broken")


# -- sizes ------------------------------------------------------------------------------------------------------------
def test_sizes() -> None:
    assert resize_shorter(noise(50, 200), 25).shape == (25, 100, 3)
    small = noise(20, 30)
    assert resize_shorter(small, 25) is small
    assert resize_and_crop(noise(50, 201), 25).shape == resize_and_crop(noise(201, 7), 25).shape == (25, 25, 3)


def test_the_crop_is_in_the_middle_and_a_square_of_the_right_size_is_untouched() -> None:
    stripes = np.repeat(np.arange(30, dtype=np.uint8)[None, :, None], 10, 0).repeat(3, 2)
    assert resize_and_crop(stripes, 10)[0, :, 0].tolist() == list(range(10, 20))
    assert np.array_equal(resize_and_crop(stripes.transpose(1, 0, 2), 10)[:, 0, 0], np.arange(10, 20))


def test_fine_patterns_do_not_alias() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_and_crop(stripes, 60).astype(int)
    assert np.abs(small[8:-8, 8:-8] - 127.5).max() < 3
    picked = stripes[:: 256 // 60, :: 256 // 60].astype(int)  # the sabotage twin: nearest neighbour
    assert np.abs(picked - 127.5).max() > 100


# -- tensors, files, grids --------------------------------------------------------------------------------------------
def test_all_levels_go_to_minus_one_to_one_and_back() -> None:
    import torch

    rgb = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    rgb[..., 1] //= 2
    image = to_tensor(rgb)
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
    assert image.min() == -1 and image.max() == 1 and image[1].max() < 0.01
    assert np.array_equal(to_rgb(image), rgb)
    batch = to_tensor(np.stack([rgb, 255 - rgb]))
    assert batch.shape == (2, 3, 16, 16) and np.array_equal(to_rgb(batch)[1], 255 - rgb)
    assert to_rgb(torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1)).tolist() == [[[0, 128, 255]]]


def test_png_is_exact_and_jpeg_keeps_thin_coloured_lines() -> None:
    pixels = noise(9, 12)
    assert np.array_equal(decode_rgb(encode_png(pixels)), pixels)
    lines = np.full((32, 32, 3), 255, np.uint8)
    lines[:, 16] = (255, 0, 0)
    error = np.abs(decode_rgb(encode_jpeg(lines, 95)).astype(int) - lines).max()
    thin = np.abs(decode_rgb(save(Image.fromarray(lines), "JPEG", quality=95)).astype(int) - lines).max()
    assert error < 12 < thin, "with chroma at half resolution the line bleeds"


def test_grid() -> None:
    pictures = [np.full((4, 6, 3), level, np.uint8) for level in (10, 20, 30)]
    grid = image_grid(pictures, 2)
    assert grid.shape == (10, 14, 3)
    assert (grid[:4, 8:] == 20).all() and (grid[6:, :6] == 30).all() and (grid[6:, 8:] == 255).all()
    with pytest.raises(ValueError, match="one size"):
        image_grid([*pictures, noise(3, 3)], 2)


def test_pixels_need_no_torch() -> None:
    code = "import sys, ldm.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- reduced scale ----------------------------------------------------------------------------------------------------
def photograph(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / np.float64(height)
    waves = [np.sin(40 * x + 9 * c * y) + np.cos(25 * y - 5 * c * x) for c in range(3)]
    return np.uint8(127.5 + 60 * np.stack(waves, -1))


@pytest.mark.parametrize("height, width, part", [
    (800, 1200, 2), (3200, 4000, 8), (1650, 1600, 4), (420, 3000, 1), (767, 767, 1), (768, 768, 2),
])  # fmt: skip
def test_a_large_jpeg_is_decoded_in_part_and_looks_the_same_when_it_is_made_small(
    height: int, width: int, part: int
) -> None:
    assert decoded_part(width, height, 256) == part
    data = encode_jpeg(photograph(height, width), 95)
    near, size, as_it_came = decode_small(data, 256)
    exact = resize_shorter(decode_rgb(data), 256)
    assert size == (height, width) and not as_it_came
    assert near.shape == exact.shape and np.abs(near.astype(int) - exact).mean() < 1.0


def test_other_formats_are_decoded_whole_and_the_size_is_that_of_the_upright_picture() -> None:
    rgb = photograph(600, 1200)
    assert np.array_equal(decode_small(encode_png(rgb), 100)[0], resize_shorter(rgb, 100))
    assert np.array_equal(decode_small(encode_png(rgb), 700)[0], rgb)
    turned, note = io.BytesIO(), Image.Exif()
    note[0x0112] = 6
    Image.fromarray(rgb).save(turned, "JPEG", exif=note)
    small, size, _ = decode_small(turned.getvalue(), 100)
    assert size == (1200, 600) and small.shape[:2] == (200, 100)


def test_a_see_through_picture_is_laid_over_the_background_before_it_is_made_small() -> None:
    """The other order would mix colours that nobody sees into the rim."""
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:, 20:] = (200, 10, 10, 255)
    rgba[:, :20, 1] = 255  # green, and wholly transparent
    small, _, _ = decode_small(save(Image.fromarray(rgba)), 7)
    assert np.array_equal(small, resize_shorter(decode_rgb(save(Image.fromarray(rgba))), 7))
    assert (small[..., 1].astype(int) - small[..., 2]).max() <= 1


@pytest.mark.parametrize("options, stays", [
    ({}, True), ({"progressive": True}, True), ({"subsampling": 2, "restart_marker_rows": 1}, True),
    ({"exif": 6}, False), ({"icc_profile": "green is red"}, False), ({"size": 60}, False), ({"mode": "CMYK"}, False),
    ({"mode": "L"}, False),
])  # fmt: skip
def test_a_jpeg_that_may_stay_as_it_is_keeps_its_pixels_and_loses_its_notes(
    options: dict[str, Any], stays: bool
) -> None:
    picture, options = Image.fromarray(photograph(64, 70)).convert(options.pop("mode", "RGB")), dict(options)
    note, size = Image.Exif(), options.pop("size", 64)
    note[0x0112], note[0x010E] = options.pop("exif", 1), "where I live"
    options["icc_profile"] = _green_is_red() if "icc_profile" in options else None
    sink = io.BytesIO()
    picture.save(sink, "JPEG", exif=note, comment=b"and who I am", **options)
    rgb, _, as_it_came = decode_small(sink.getvalue(), size)
    assert as_it_came == stays and b"where I live" in sink.getvalue()
    if stays:
        bare = without_notes(sink.getvalue() + b"PK\x03\x04 another file \xff\xd9")
        assert np.array_equal(decode_rgb(bare), rgb) and bare.endswith(b"\xff\xd9")
        assert not any(words in bare for words in (b"where I live", b"who I am", b"another file"))


def test_markers_of_a_jpeg_that_lead_nowhere_are_an_error_and_no_endless_loop() -> None:
    whole = encode_jpeg(photograph(32, 32), 90)
    for end in range(2, len(whole) - 1):
        with pytest.raises(ValueError, match="expected a marker"):
            without_notes(whole[:end])
