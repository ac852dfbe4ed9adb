"""Large pictures, encoded and decoded in overlapping tiles: memory grows with the tile instead of the picture.

Tiles are blended where they overlap: the weight of each falls off linearly towards the edges that it shares. A picture
of one tile comes out as without tiles, to the bit. With several it does not: group norms and attention see a tile
where they saw the picture, so overlaps should be generous (a quarter of the tile).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.models.tiny_autoencoder import TinyAutoencoder


def encode_tiled(autoencoder: Autoencoder | TinyAutoencoder, image: Tensor, tile: int, overlap: int) -> Tensor:
    """Image (b, 3, H, W) -> moments (b, 2c, h, w) or latent (b, c, h, w); tile and overlap in pixels."""
    factor = autoencoder.factor
    for name, value in (("tile", tile), ("overlap", overlap), ("height", image.shape[2]), ("width", image.shape[3])):
        if value % factor:
            raise ValueError(f"{name} is {value} pixels; it must be a multiple of {factor}")
    height, width = image.shape[2] // factor, image.shape[3] // factor

    def run(top: int, left: int, h: int, w: int) -> Tensor:
        rows = slice(top * factor, (top + h) * factor)
        return autoencoder.encode(image[:, :, rows, left * factor : (left + w) * factor])

    return _blend(run, height, width, tile // factor, overlap // factor, scale=1)


def decode_tiled(autoencoder: Autoencoder | TinyAutoencoder, z: Tensor, tile: int, overlap: int) -> Tensor:
    """Unscaled latent (b, c, h, w) -> image (b, 3, H, W); tile and overlap in latents."""

    def run(top: int, left: int, h: int, w: int) -> Tensor:
        return autoencoder.decode(z[:, :, top : top + h, left : left + w])

    return _blend(run, z.shape[2], z.shape[3], tile, overlap, scale=autoencoder.factor)


def _blend(
    run: Callable[[int, int, int, int], Tensor], height: int, width: int, tile: int, overlap: int, scale: int
) -> Tensor:
    """The weighted mean of what `run(top, left, h, w)` says of tiles; its output is `scale` times as high and wide."""
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} does not fit a tile of {tile}: it must be smaller, and not negative")
    total: Tensor | None = None
    rows, columns = _places(height, tile, overlap), _places(width, tile, overlap)
    for top, h in rows:
        for left, w in columns:
            part = run(top, left, h, w)
            down = _ramp(top, h, height, overlap, scale).to(part)
            across = _ramp(left, w, width, overlap, scale).to(part)
            if total is None:
                total = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                weights = total.new_zeros(height * scale, width * scale)
            weight = down[:, None] * across
            place = slice(top * scale, (top + h) * scale), slice(left * scale, (left + w) * scale)
            total[:, :, *place] += part * weight
            weights[place] += weight
    return total / weights


def _places(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Starts and sizes of tiles that cover `size`; the last one ends where the picture does."""
    if size <= tile:
        return [(0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    return [(start, tile) for start in starts]


def _ramp(start: int, length: int, size: int, overlap: int, scale: int) -> Tensor:
    """Weights (length * scale,): 1, falling off over the overlap at an edge that is not the picture's own."""
    weight = torch.ones(length * scale)
    slope = (torch.arange(overlap * scale) + 1) / (overlap * scale + 1)
    if start > 0 and overlap:
        weight[: overlap * scale] = slope
    if start + length < size and overlap:
        weight[-overlap * scale :] *= slope.flip(0)
    return weight
