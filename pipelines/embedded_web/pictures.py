"""The bytes that the embedded web serves: drawings in the formats and with the oddities of real pictures.

The subjects were chosen once, greedily, from the animals, food, plants, vehicles, faces and things among the drawings:
colourful first, and each at least 12 of 64 bits of perceptual hash away from all before it, in every format and size
and whether drawn on a square, a wide or a tall ground. A small model can tell them apart, and so can the search for
near-duplicates. Left out is what is so symmetric that its own hash changes with its size; it has many bits that hang
on less than a level of grey.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from pipelines.embedded_web.drawings import Drawing, drawings, render

# Hexcodes in the order of choice: a web of n good pictures takes the first n.
SUBJECTS = """
    1F34C 1F34E 1F355 1F3E0 1F431 1F98B 1F60E 1F3C0 1F30A 1F9C0 1F364 1F35E 1F981 1F36F 1F369 1F383 1F9F0 1F96A 1F3BD
    1F96E 1F351 1F954 1F388 1F3C5 1F456 1F3D3 1F9ED 1F437 1F96D 1F6A4 1F9C3 1F48E 1F9C5 1F439 1F9E9 1F6A2 1F35C 1F333
    1F45A 1F3DC 1F370 1F3AB 1F6E5 1F4B0 1F37F 1F9A7 1F96C 26F5 1F956 1F959 1F335 1F415 1F41F 1FAD2 1F350 1F308 1F45B
    1FAB5 1F416 1F458 1F3AF 1F942 1F960 1F983 1F422 1F9E3 1F941 1F986 1F37C 1F6F3 1F349 1F45E 1FAD1 1F384 1F42A 1F379
    1F36C 1F9FD 1FA87 1F33D 1FAD8 1F37A 1F408 1FA8E 1F9F6 1F3D5 1F3A8 1F9FC 1F6E1 1F40E 1F97E 1FA96 1F9E2 1F680 1F985
    1F413 1F9A3 1F952 1F41B 1F98C 1FAB9 1F3C6 1F432 1F697 1F95C 1F3E1 1F999 1F995 1F389 1F41D 1F412 1FADB 1F95E 1FA74
    1F36D 1F366 1F9F5 1F990 1F33C 1FA70 1F40D 1F6FC 1F953 1F683 1F9EF 1F9AB 1F409 1FA85 1F9AA 1F6F6 1FA94 1F452 1F490
    1F367 1F352 1F996 1F3DD 1F4DA 1F406 1FA8A 1F9F4 1F984 1FAB8 1F38A 1F38F 1FA89 1F955 1F361 1F992 1FA81 1F339 1F3CD
    1F68E 1F9A4 1F484 1FAB4 1F692 1F6E9 1F6A0 1F3BF 1FA83 1F37E 1F99C 1F337 1F433 1F334 1F3ED 1F3A1 1F998 1F423 1F681
    1F378 1F343 1F3A3 1FA88 1F9A9 1F362 1F3BA 1FAB1 1F421 1F9AC 1F997 1F991 1F414 1F35D 1F68A 1F682 2602 1F3D8 1F69F
    1F69C 1F42D
""".split()
UNSTEADY = ("1F98B",)  # the butterfly is symmetric, but people ask for it: never copied in another size

FORMATS = {  # of good pictures: format -> how many of 100
    "jpeg": 30, "turned_jpeg": 12, "cmyk_jpeg": 6, "png": 14, "palette_png": 8, "alpha_png": 10, "deep_png": 4,
    "webp": 10, "gif": 6,
}  # fmt: skip
MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}
EXIF_ORIENTATION = 0x0112
# How to lay a picture into a file whose EXIF note says 2 to 8, so that a reader who minds the note sees it upright.
LAID = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Picture:
    """One drawing in the middle of a white ground, as a file of some format."""

    hexcode: str
    width: int  # pixels, seen upright
    height: int
    format: str  # a key of FORMATS
    orientation: int = 1  # EXIF, for turned_jpeg

    @property
    def suffix(self) -> str:
        """What its format is called at the end of a file's name: jpeg, png, webp or gif."""
        return self.format.rpartition("_")[2]


@cache
def by_hexcode() -> dict[str, Drawing]:
    """All drawings by their identity."""
    return {drawing.hexcode: drawing for drawing in drawings()}


def paint(picture: Picture) -> Image.Image:
    """The picture upright, RGBA; the ground is see-through and, where nobody should look, magenta."""
    side = min(picture.width, picture.height)
    pixels = np.zeros((picture.height, picture.width, 4), np.uint8)
    top, left = (picture.height - side) // 2, (picture.width - side) // 2
    pixels[top : top + side, left : left + side] = render(by_hexcode()[picture.hexcode], side)
    pixels[pixels[..., 3] == 0] = (255, 0, 255, 0)
    return Image.fromarray(pixels)


def encode(picture: Picture) -> bytes:
    """The file of a picture; the same bytes every time, for one version of Pillow and resvg."""
    clear = paint(picture)
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    match picture.format:
        case "jpeg":
            return _save(white, "JPEG", quality=92)
        case "turned_jpeg":
            note = Image.Exif()
            note[EXIF_ORIENTATION] = picture.orientation
            return _save(white.transpose(LAID[picture.orientation]), "JPEG", quality=92, exif=note)
        case "cmyk_jpeg":
            return _save(white.convert("CMYK"), "JPEG", quality=92)
        case "png":
            return _save(white, "PNG", compress_level=1)
        case "palette_png":
            return _save(clear.quantize(256, Image.Quantize.FASTOCTREE), "PNG", compress_level=1)
        case "alpha_png":
            return _save(clear, "PNG", compress_level=1)
        case "deep_png":
            return deep_png(np.asarray(white))
        case "webp":
            return _save(white, "WEBP", quality=90, method=0)
        case "gif":
            return _save(white.quantize(256, dither=Image.Dither.NONE), "GIF")
    raise ValueError(f"no picture format {picture.format!r}; expected one of {', '.join(FORMATS)}")


def _save(picture: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format, **options)  # type: ignore[arg-type]
    return sink.getvalue()


def deep_png(rgb: np.ndarray) -> bytes:
    """(h, w, 3) uint8 as a PNG of 16 bits a channel, which Pillow reads but does not write."""
    height, width, _ = rgb.shape
    rows = (rgb.astype(">u2") * 257).astype(">u2").view(np.uint8).reshape(height, -1)
    return _png(width, height, 16, 2, np.pad(rows, ((0, 0), (1, 0))).tobytes())


def bomb() -> bytes:
    """A PNG of about a kilobyte that says it is 30,000 pixels wide and high."""
    return _png(30_000, 30_000, 8, 2, bytes(1 << 20))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
