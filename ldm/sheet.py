"""Pictures on one sheet, each with its caption below, under headings: the grids that people look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, SOFT = (250, 249, 246), (35, 38, 43), (109, 114, 123)
RIGHT, WRONG = (47, 143, 107), (184, 71, 71)
GAP, TEXT, HEADING = 10, 12, 15  # pixels: between tiles, and heights of letters
LINES = 2  # of a caption


@dataclass(frozen=True)
class Tile:
    """One or more pictures side by side and what stands below them."""

    images: Sequence[Tensor]  # each (3, H, W) in [-1, 1], all of one size
    caption: str
    right: bool | None = None  # a green or a red frame; None is without


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], cut to it, as a picture of 8 bits."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels.cpu().numpy()))


def draw_sheet(sections: Sequence[tuple[str, Sequence[Tile]]], columns: int) -> bytes:
    """A PNG of tiles in rows under the heading of their section; sections without tiles are left out."""
    sections = [(heading, tiles) for heading, tiles in sections if tiles]
    if not sections:
        raise ValueError("a sheet needs at least one picture")
    first = sections[0][1][0]
    height, width = first.images[0].shape[-2], first.images[0].shape[-1] * len(first.images)
    tile_height = height + 6 + LINES * (TEXT + 3)
    rows = [-(-len(tiles) // columns) for _, tiles in sections]
    head = HEADING + 2 * GAP
    size = (GAP + columns * (width + GAP), sum(head + count * (tile_height + GAP) for count in rows))
    sheet = Image.new("RGB", size, PAPER)
    top = 0
    for (heading, tiles), count in zip(sections, rows, strict=True):
        ImageDraw.Draw(sheet).text((GAP, top + GAP), heading, INK, ImageFont.load_default(HEADING))
        for i, tile in enumerate(tiles):
            left = GAP + (i % columns) * (width + GAP)
            _draw_tile(sheet, tile, left, top + head + (i // columns) * (tile_height + GAP))
        top += head + count * (tile_height + GAP)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _draw_tile(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    width = 0
    for image in tile.images:
        picture = to_picture(image)
        sheet.paste(picture, (left + width, top))
        width += picture.width
    height = tile.images[0].shape[-2]
    if tile.right is not None:
        frame = (left - 2, top - 2, left + width + 1, top + height + 1)
        draw.rectangle(frame, outline=RIGHT if tile.right else WRONG, width=3)
    for i, line in enumerate(wrap(tile.caption, width, font)):
        draw.text((left, top + height + 4 + i * (TEXT + 3)), line, SOFT, font)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """At most LINES lines of words that are no wider than `width` pixels; what is cut ends in dots."""
    lines, words = [""], text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < LINES:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[i:]])
            break
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."
