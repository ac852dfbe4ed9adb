"""Shapes for pictures that are not square: about the area of the square, sides in steps, the nearest one taken.

With 256 pixels, steps of 64 and an aspect of at most 2 (height x width):   192x320  192x384  256x256  320x192  384x192
"""

from __future__ import annotations

import math

import numpy as np

from ldm.images import resize, resize_and_crop

Shape = tuple[int, int]  # height, width in pixels


def bucket_shapes(resolution: int, max_aspect: float, step: int) -> list[Shape]:
    """The shapes with sides in steps, an area near the square's and an aspect of at most `max_aspect`; sorted."""
    if resolution % step or step < 1 or max_aspect < 1:
        raise ValueError(
            f"buckets of aspect {max_aspect} in steps of {step} pixels do not fit a resolution of {resolution}: the "
            f"step must divide it, and the aspect be 1 or more (dataset.precompute_latents.buckets)"
        )
    found = {(resolution, resolution)}
    for width in range(step, int(resolution * math.sqrt(max_aspect)) + step, step):
        height = round(resolution**2 / width / step) * step
        if height and max(height, width) <= max_aspect * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_shape(shapes: list[Shape], height: int, width: int) -> Shape:
    """The shape whose aspect ratio is nearest to a picture's, so that the least is cut off; of equal ones the first."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - math.log(height / width)))


def fit(rgb: np.ndarray, shape: Shape) -> np.ndarray:
    """A picture (h, w, 3) uint8, made as large as a shape needs and cut to its middle: (height, width, 3) uint8."""
    height, width = shape
    if height == width:
        return resize_and_crop(rgb, height)
    scale = max(height / rgb.shape[0], width / rgb.shape[1])
    size = (max(width, round(rgb.shape[1] * scale)), max(height, round(rgb.shape[0] * scale)))
    rgb = resize(rgb, size)
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return np.ascontiguousarray(rgb[top : top + height, left : left + width])
