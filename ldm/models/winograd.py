"""3x3 convolutions with a quarter of the products, for training and sampling on a processor.

A float32 convolution on a processor already runs at the speed at which the processor multiplies, so the one thing
left that helps is to multiply less. Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, Sec. 4) takes the
16 pixels of a tile of results from 36 products in place of 144: a tile of 6 x 6 inputs and the 3 x 3 weights are
taken to a space of 36 coordinates by fixed matrices, multiplied there - one matrix product (tiles, c) x (c, c') for
each coordinate - and taken back. The backward pass is the same three steps transposed.

What the 36 coordinates take is more than twice the picture, so it goes strip by strip, each small enough for the
processor's cache. Taking the weights there costs as much as the products where pictures are small: without gradients
what they became is kept.

The price is rounding, about 5e-6 of the largest value where a direct convolution has 1e-6, and four times the memory
of the weights where those are kept. So it is asked for from outside, by `use_winograd`; GPUs have this in their own
libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

TILE = 4  # results along each side of a tile; 6 inputs, since neighbouring tiles share two
LEAST_CHANNELS = 64  # below, moving tiles costs more than the products that it saves
LEAST_TILES = 32  # below, taking the weights to the 36 coordinates does
STRIP_TILES = 128  # at once: with 128 to 512 channels 2 to 9 MB in the 36 coordinates, and as much again of products


def both_sides(rows: list[list[float]]) -> Tensor:
    """A matrix for one side of a tile -> the one for both sides at once."""
    side = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return torch.kron(side, side).float()


FROM_INPUT = both_sides(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)  # (36, 36)
FROM_WEIGHT = both_sides(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)  # (36, 9)
TO_RESULT = both_sides([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])  # (16, 36)


def use_winograd(model: nn.Module) -> None:
    """Have every 3x3 convolution of a model take this way wherever it is quicker: on a processor, in float32.

    State-dict names do not change.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and is_plain_3x3(module):
            module.forward = partial(convolve, module)


def is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Whether it is a 3x3 convolution that keeps the sides, with a bias and channels enough to be worth it."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv` makes of x (b, c, h, w): (b, c', h, w)."""
    b, _, h, w = x.shape
    quicker = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and h % TILE == 0
        and w % TILE == 0
        and b * h * w // TILE**2 >= LEAST_TILES
    )
    if not quicker:
        return F.conv2d(x, conv.weight, conv.bias, padding=1)
    if torch.is_grad_enabled():
        return Winograd.apply(x, conv.weight, conv.bias)
    return convolve_strips(x, kept_weight(conv), conv.bias, keep=None)


def kept_weight(conv: nn.Conv2d) -> Tensor:
    """The transformed weight (36, c, c'), made again only when the weight is another or has changed."""
    if conv.weight.is_inference():  # nobody counts its changes
        return transform_weight(conv.weight)
    version = conv.weight.data_ptr(), conv.weight._version
    if getattr(conv, "winograd", (None,))[0] != version:
        conv.winograd = version, transform_weight(conv.weight.detach()).contiguous()
    return conv.winograd[1]


class Winograd(torch.autograd.Function):
    """x (b, c, h, w), weight (c', c, 3, 3), bias (c',) -> (b, c', h, w) in channels_last memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        y = convolve_strips(x, transform_weight(weight), bias, keep=inputs)
        ctx.save_for_backward(weight, *inputs)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        weight, *inputs = ctx.saved_tensors
        b, c, h, w = ctx.shape
        grad = grad.permute(0, 2, 3, 1)  # (b, h, w, c')
        transformed = transform_weight(weight).transpose(1, 2)  # (36, c', c)
        in_weight = weight.new_zeros(transformed.shape)
        grad_x = grad.new_zeros(b, h + TILE, w + TILE, c)  # with what tiles have beyond the picture
        for (images, rows), strip in zip(strips(b, h, w), inputs, strict=True):
            products = transform_result(grad[images, rows])  # (36, n, c')
            in_weight.baddbmm_(products.transpose(1, 2), strip)
            if ctx.needs_input_grad[0]:
                tiles = (FROM_INPUT.t() @ torch.bmm(products, transformed).view(36, -1)).view(6, 6, -1, w // TILE, c)
                part = grad_x[images, rows.start : rows.stop + TILE]
                part += add_tiles(tiles.unflatten(2, (len(part), -1)))
        grad_weight = (FROM_WEIGHT.t() @ in_weight.view(36, -1)).view(3, 3, -1, c).permute(2, 3, 0, 1)
        grad_x = grad_x[:, 1 : h + 1, 1 : w + 1].permute(0, 3, 1, 2) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad.sum(dim=(0, 1, 2))


def strips(b: int, h: int, w: int) -> Iterator[tuple[slice, slice]]:
    """Parts (images, rows) of a batch of about STRIP_TILES tiles each: some rows of tiles, or some whole pictures."""
    in_row = w // TILE
    rows = min(h, max(1, STRIP_TILES // in_row) * TILE)
    images = max(1, STRIP_TILES // (in_row * h // TILE)) if rows == h else 1
    for image in range(0, b, images):
        for top in range(0, h, rows):
            yield slice(image, min(b, image + images)), slice(top, min(h, top + rows))


def convolve_strips(x: Tensor, transformed: Tensor, bias: Tensor, keep: list[Tensor] | None) -> Tensor:
    """x (b, c, h, w), weight (36, c, c'), bias (c',) -> (b, c', h, w); `keep` is given each strip's (36, n, c)."""
    b, _, h, w = x.shape
    y = x.new_empty(b, h, w, transformed.shape[2])
    for images, rows in strips(b, h, w):
        inputs = transform_input(x[images], rows)
        products = torch.bmm(inputs, transformed)  # (36, n, c')
        place = y[images, rows].unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))  # (b, h/4, 4, w/4, 4, c')
        results = (TO_RESULT @ products.view(36, -1)).view(TILE, TILE, *place.shape[:2], *place.shape[3::2])
        torch.add(results.permute(2, 3, 0, 4, 1, 5), bias, out=place)
        if keep is not None:
            keep.append(inputs)
    return y.permute(0, 3, 1, 2)


def transform_input(x: Tensor, rows: slice) -> Tensor:
    """x (b, c, h, w) -> (36, n, c): each overlapping 6 x 6 tile of some of its rows in the 36 coordinates."""
    h, c = x.shape[2], x.shape[1]
    above, below = int(rows.start == 0), int(rows.stop == h)
    part = x[:, :, rows.start - 1 + above : rows.stop + 1 - below].permute(0, 2, 3, 1)
    padded = F.pad(part, (0, 0, 1, 1, above, below))  # (b, rows + 2, w + 2, c)
    tiles = padded.unfold(1, 6, TILE).unfold(2, 6, TILE)  # (b, rows/4, w/4, c, 6, 6)
    return (FROM_INPUT @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)).view(36, -1, c)


def transform_result(grad: Tensor) -> Tensor:
    """Gradients of results (b, rows, w, c') -> (36, n, c'), those of the products that they were made of."""
    tiles = grad.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(2, 4, 0, 1, 3, 5)
    return (TO_RESULT.t() @ tiles.reshape(TILE**2, -1)).view(36, -1, grad.shape[3])


def transform_weight(weight: Tensor) -> Tensor:
    """weight (c', c, 3, 3) -> (36, c, c'), in the memory of (c', 36, c)."""
    out, c = weight.shape[:2]
    return torch.matmul(FROM_WEIGHT, weight.permute(0, 2, 3, 1).reshape(out, 9, c)).permute(1, 2, 0)


def add_tiles(tiles: Tensor) -> Tensor:
    """Overlapping tiles (6, 6, b, h/4, w/4, c), summed where they overlap -> (b, h + 4, w + 4, c)."""
    b, rows, columns, c = tiles.shape[2:]
    padded = tiles.new_zeros(b, rows + 1, TILE, columns + 1, TILE, c)
    view = padded.permute(2, 4, 0, 1, 3, 5)  # (4, 4, b, rows + 1, columns + 1, c)
    view[:, :, :, :-1, :-1] = tiles[:4, :4]
    view[:2, :, :, 1:, :-1] += tiles[4:, :4]  # a tile's last two rows are its lower neighbour's first two
    view[:, :2, :, :-1, 1:] += tiles[:4, 4:]
    view[:2, :2, :, 1:, 1:] += tiles[4:, 4:]
    return padded.view(b, TILE * (rows + 1), TILE * (columns + 1), c)
