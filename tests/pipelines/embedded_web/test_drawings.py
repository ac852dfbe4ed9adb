"""The drawings: how many, in which order, with which captions and pixels."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipelines.embedded_web.drawings import Drawing, drawings, render, render_on


def find(hexcode: str) -> Drawing:
    return next(drawing for drawing in drawings() if drawing.hexcode == hexcode)


def test_there_are_as_many_as_have_both_a_drawing_and_a_name() -> None:
    found = drawings()
    assert len(found) >= 3_900
    assert [drawing.hexcode for drawing in found] == sorted({drawing.hexcode for drawing in found})
    assert all(drawing.svg.is_file() for drawing in found)


def test_captions_are_plain_words_and_name_one_drawing_each() -> None:
    captions = [drawing.caption for drawing in drawings()]
    assert len(set(captions)) == len(captions)
    assert not [caption for caption in captions if re.search(r"[:_]|^\s|\s$|\s\s", caption) or not caption]
    assert find("1F600").caption == "grinning face"
    assert find("1F44B-1F3FB").caption == "waving hand light skin tone"


def test_a_flag_is_called_a_flag() -> None:
    assert find("1F1EB-1F1F7").caption == "flag of France"
    assert find("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F").caption == "flag of England"
    assert find("1F3C1").caption == "chequered flag"


def test_skin_tones_share_a_motif() -> None:
    assert find("1F44B-1F3FB").motif == find("1F44B-1F3FF").motif == find("1F44B").motif == "1F44B"


@pytest.mark.parametrize("size", [32, 128])
def test_pixels_over_a_transparent_ground(size: int) -> None:
    image = render(find("1F600"), size)
    assert image.shape == (size, size, 4) and image.dtype == np.uint8
    assert image[0, 0, 3] == 0 and image[size // 2, size // 2, 3] == 255
    red, green, blue = image[size // 3, size // 2, :3].astype(int)
    assert red > 200 and green > 180 and blue < 120  # the face is yellow
    np.testing.assert_array_equal(image, render(find("1F600"), size))


def test_pixels_over_a_plain_ground() -> None:
    white, blue = (render_on(find("1F600"), 64, ground) for ground in ((255, 255, 255), (0, 0, 255)))
    assert tuple(white[0, 0]) == (255, 255, 255) and tuple(blue[0, 0]) == (0, 0, 255)
    np.testing.assert_array_equal(white[32, 32], blue[32, 32])
