"""Sheets of pictures: everything is where it belongs and no text leaves its tile."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ldm.sheet import GAP, LINES, RIGHT, TEXT, WRONG, Tile, draw_sheet, to_picture, wrap


def solid(value: float, side: int = 32) -> torch.Tensor:
    return torch.full((3, side, side), value)


def open_sheet(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_to_picture_cuts_and_rounds() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert np.asarray(to_picture(image))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_pictures_stand_in_rows() -> None:
    tiles = [Tile([solid(-1 + i / 4)], str(i)) for i in range(5)]
    sheet = open_sheet(draw_sheet([("heading", tiles)], columns=3))
    assert sheet.shape[1] == GAP + 3 * (32 + GAP)
    row = 32 + 6 + LINES * (TEXT + 3) + GAP
    top = sheet.shape[0] - 2 * row
    for i in range(5):
        y, x = top + (i // 3) * row + 16, GAP + (i % 3) * (32 + GAP) + 16
        assert abs(int(sheet[y, x, 0]) - (i / 4) * 127.5) <= 1, i


def test_right_and_wrong_have_their_colours() -> None:
    tiles = [Tile([solid(0), solid(1)], "a", right=True), Tile([solid(0), solid(1)], "b", right=False)]
    colours = {tuple(colour) for colour in open_sheet(draw_sheet([("", tiles)], 2)).reshape(-1, 3).tolist()}
    assert {RIGHT, WRONG} <= colours


def test_sections_without_tiles_are_left_out() -> None:
    one = draw_sheet([("seen", [Tile([solid(0)], "a")])], 2)
    assert draw_sheet([("seen", [Tile([solid(0)], "a")]), ("unseen", [])], 2) == one
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet([("seen", [])], 2)


@pytest.mark.parametrize("text", ["", "cat", "cat face with tears of joy and a very long tail", "x" * 200, "a " * 90])
def test_captions_stay_inside(text: str) -> None:
    font = ImageFont.load_default(TEXT)
    lines = wrap(text, 96, font)
    assert 1 <= len(lines) <= LINES and all(font.getlength(line) <= 96 for line in lines)
    if font.getlength(text.strip()) <= 96:
        assert lines == [text.strip()]
    else:
        assert lines[-1].endswith("...")
