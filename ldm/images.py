"""Bytes <-> pixels <-> image in [-1, 1].

A picture from the web is turned the way its camera meant it, scaled to 8 bits (not clipped), converted to sRGB and laid
over a plain background; what cannot be read whole is refused with one word. Torch is imported inside the two functions
that need it, so that a downloader does not wait for it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else []))
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
WHITE = (255, 255, 255)
EXIF_ORIENTATION = 0x0112
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, RuntimeError, struct.error,
)  # fmt: skip

ROWS_AT_ONCE = 256
FILTER = Image.Resampling.BICUBIC  # its support grows with the reduction, so that fine patterns do not alias
SRGB_LEVELS = 2  # of 255, by which a profile that is sRGB under another name moves a colour at most

START_OF_SCAN = 0xDA
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next marker that is neither a stuffed byte nor a restart
NOTES = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP13, APP15 and COM; APP0 and APP14 say how colours are meant

# What undoes each EXIF orientation; 1 is upright, anything else is no orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDES_EXCHANGED = (5, 6, 7, 8)


class ImageError(ValueError):
    """Bytes that give no picture; `reason` is one word: not_an_image, too_many_pixels, truncated or broken."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# -- bytes -> pixels --------------------------------------------------------------------------------------------------
def decode_rgb(data: bytes, *, background: tuple[int, int, int] = WHITE, max_pixels: int = 89_000_000) -> np.ndarray:
    """The first frame of a JPEG, PNG, WebP, GIF or AVIF as (h, w, 3) uint8: sRGB, upright, laid over the background.

    Raises ImageError, and nothing else, for bytes that are no whole picture. The size is read from the header and
    refused before anything is decoded.
    """
    return _decode(data, background, max_pixels, None)[0]


def decode_small(
    data: bytes, shorter: int, *, background: tuple[int, int, int] = WHITE, max_pixels: int = 89_000_000
) -> tuple[np.ndarray, tuple[int, int], bool]:
    """(pixels, height and width of the whole picture, whether the bytes are a JPEG that says just these pixels).

    Like decode_rgb and resize_shorter for a fraction of the time: a JPEG that is much larger is decoded at a half, a
    quarter or an eighth of its size, which its format allows.
    """
    return _decode(data, background, max_pixels, shorter)


def decoded_part(width: int, height: int, shorter: int) -> int:
    """The n of the 1/n at which a JPEG is decoded: at least 1.5 times what is wanted is left for the filter."""
    return next((n for n in (8, 4, 2) if min(width, height) >= 1.5 * n * shorter), 1)


def _decode(
    data: bytes, background: tuple[int, int, int], max_pixels: int, shorter: int | None
) -> tuple[np.ndarray, tuple[int, int], bool]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that we check ourselves
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise ImageError("too_many_pixels", f"{width} x {height} pixels; expected at most {max_pixels}")
                if shorter is not None and picture.format == "JPEG":
                    part = decoded_part(width, height, shorter)
                    picture.draft(None, (width // part, height // part))  # type: ignore[arg-type]
                picture.load()
                orientation = _orientation(picture)
                upright = picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture
                size = (width, height) if orientation in SIDES_EXCHANGED else (height, width)
                final = _to_srgb(upright)
                as_it_came = picture.format == "JPEG" and final is picture and min(size) <= (shorter or 0)
                return _pixels(final, background, shorter), size, as_it_came
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except BROKEN as error:
        reason = _why_broken(data, error)
        raise ImageError(reason, f"{len(data)} bytes, {data[:8]!r}..., cannot be decoded: {error}") from error


def _pixels(picture: Image.Image, background: tuple[int, int, int], shorter: int | None) -> np.ndarray:
    if shorter is None:
        return _lay_over(picture, background)
    if picture.mode == "RGB" and min(picture.size) > shorter:  # before it becomes an array, which spares two copies
        return np.asarray(picture.resize(_size_for(picture.size, shorter), FILTER))
    return resize_shorter(_lay_over(picture, background), shorter)


def _why_broken(data: bytes, error: Exception) -> str:
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    avif = data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis")
    if (webp and int.from_bytes(data[4:8], "little") + 8 > len(data)) or (avif and _ends_inside_a_box(data)):
        return "truncated"
    if isinstance(error, UnidentifiedImageError):
        return "broken" if webp or avif or data.startswith(MAGIC) else "not_an_image"
    return "truncated" if "truncated" in str(error).lower() else "broken"


def _ends_inside_a_box(data: bytes) -> bool:
    """Whether a file of the ISO base media format (AVIF) ends before its last box does."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:  # to the end of the file, or a size that no picture needs
            return False
        at += size
    return at != len(data)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(EXIF_ORIENTATION, 1)
    except BROKEN:  # a broken note on a good picture
        return 1


def _to_srgb(picture: Image.Image) -> Image.Image:
    """8 bits a channel, sRGB, with alpha where there is some: mode RGB or RGBA."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
        picture = _scale_16_bit(picture)
    if picture.mode in ("CMYK", "L") and "transparency" not in picture.info:
        return _apply_profile(picture, profile) or picture.convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("L", "LA") else "RGBA")
        colour = picture.convert("L" if picture.mode == "LA" else "RGB")  # the mode that a profile speaks of
        colour = _apply_profile(colour, profile) or colour.convert("RGB")
        colour.putalpha(picture.getchannel("A"))
        return colour
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")  # a copy may be 300 MB
    return _apply_profile(picture, profile) or picture


def _scale_16_bit(picture: Image.Image) -> Image.Image:
    levels = np.asarray(picture).astype(np.float64)
    grey = Image.fromarray(np.rint(levels / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info:  # one level of the 65,536 is see-through
        alpha = Image.fromarray(np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _apply_profile(picture: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The picture in sRGB; None where there is nothing to do: no profile, sRGB's own, or one that cannot be used.

    Browsers ignore the last kind too.
    """
    if not profile:
        return None
    try:
        transform = _transform(profile, picture.mode)
        return None if transform is None else ImageCms.applyTransform(picture, transform)
    except (ImageCms.PyCMSError, ValueError, OSError):
        return None


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns colours into sRGB; None where they are that already, as most profiles on the web say."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 15, np.uint8)] * 3), -1).reshape(18, -1, 3)
    turned = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return None if np.abs(turned.astype(int) - colours).max() <= SRGB_LEVELS else transform


def _lay_over(picture: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    """Straight alpha: colour * alpha + background * (1 - alpha), rounded once; some rows at a time, to spare memory."""
    laid = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, ROWS_AT_ONCE):
        rows = np.asarray(picture.crop((0, top, picture.width, min(top + ROWS_AT_ONCE, picture.height))))
        if picture.mode == "RGB":
            laid[top : top + ROWS_AT_ONCE] = rows
            continue
        alpha = rows[..., 3:].astype(np.float32) / 255
        laid[top : top + ROWS_AT_ONCE] = np.rint(rows[..., :3] * alpha + np.float32(background) * (1 - alpha))
    return laid


# -- sizes ------------------------------------------------------------------------------------------------------------
def resize_shorter(rgb: np.ndarray, size: int) -> np.ndarray:
    """Makes a picture smaller, (h, w, 3) uint8, until its shorter side is `size`; smaller ones stay as they are."""
    return _resize(rgb, size) if min(rgb.shape[:2]) > size else rgb


def resize_and_crop(rgb: np.ndarray, resolution: int) -> np.ndarray:
    """Shorter side to `resolution`, up or down, then the square in the middle: (resolution, resolution, 3) uint8."""
    rgb = _resize(rgb, resolution)
    top, left = (rgb.shape[0] - resolution) // 2, (rgb.shape[1] - resolution) // 2
    return np.ascontiguousarray(rgb[top : top + resolution, left : left + resolution])


def _resize(rgb: np.ndarray, shorter: int) -> np.ndarray:
    return resize(rgb, _size_for((rgb.shape[1], rgb.shape[0]), shorter))


def _size_for(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with a shorter side of `shorter`."""
    scale = shorter / min(size)
    return max(shorter, round(size[0] * scale)), max(shorter, round(size[1] * scale))


def resize(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) uint8 at (width, height)."""
    return rgb if size == (rgb.shape[1], rgb.shape[0]) else np.asarray(Image.fromarray(rgb).resize(size, FILTER))


# -- pixels <-> tensor ------------------------------------------------------------------------------------------------
def to_tensor(rgb: np.ndarray) -> Tensor:
    """(h, w, 3) or (b, h, w, 3) uint8 -> image (3, H, W) or (b, 3, H, W) float32 in [-1, 1]."""
    import torch

    levels = torch.from_numpy(np.moveaxis(rgb, -1, -3).astype(np.float32, order="C"))
    return levels / 127.5 - 1


def to_rgb(image: Tensor) -> np.ndarray:
    """image (3, H, W) or (b, 3, H, W) in [-1, 1], cut to it -> (H, W, 3) or (b, H, W, 3) uint8."""
    import torch

    levels = ((image.detach().to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.movedim(-3, -1).cpu().numpy())


# -- pixels -> bytes --------------------------------------------------------------------------------------------------
def encode_png(rgb: np.ndarray) -> bytes:
    """(h, w, 3) uint8 as PNG."""
    return _encode(rgb, format="PNG")


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """(h, w, 3) uint8 as JPEG with full colour resolution: thin coloured lines are what drawings are made of."""
    return _encode(rgb, format="JPEG", quality=quality, subsampling=0)


def without_notes(jpeg: bytes) -> bytes:
    """The same JPEG without EXIF, profiles, comments and whatever follows its end.

    Raises ValueError where its markers do not follow each other as they should (ITU-T T.81, annex B).
    """
    parts, at = [jpeg[:2]], 2
    while (marker := jpeg[at : at + 2]) != b"\xff\xd9":
        if len(marker) < 2 or marker[0] != 0xFF:
            raise ValueError(f"found {marker!r} at byte {at} of {len(jpeg)}, expected a marker of JPEG")
        if marker[1] == 0xFF:  # a byte of filling
            at += 1
            continue
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker[1] == START_OF_SCAN:
            found = SCAN_END.search(jpeg, end)
            end = found.start() if found else len(jpeg)
        if marker[1] not in NOTES:
            parts.append(jpeg[at:end])
        at = end
    return b"".join([*parts, marker])


def _encode(rgb: np.ndarray, **options: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, **options)  # type: ignore[arg-type]
    return sink.getvalue()


def image_grid(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures of one size, each (h, w, 3) uint8, row by row on a white sheet, `gap` pixels apart."""
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1 or columns < 1:
        raise ValueError(f"a grid needs pictures of one size and at least one column; found {sizes}, {columns} columns")
    height, width, _ = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
