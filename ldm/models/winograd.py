"""3x3 convolutions with a quarter of the products, for training and sampling on a processor.

A float32 convolution on a processor already runs at the speed at which the processor multiplies, so the one thing
left that helps is to multiply less. Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, Sec. 4) takes the
16 pixels of a tile of results from 36 products in place of 144: a tile of 6 x 6 inputs and the 3 x 3 weights are
taken to a space of 36 coordinates by fixed matrices, multiplied there - one matrix product (tiles, c) x (c, c') for
each coordinate - and taken back. The backward pass is the same three steps transposed.

The price is rounding: about 5e-6 of the largest value, where a direct convolution has 1e-6. So it is asked for from
outside, by `use_winograd`; GPUs have this in their own libraries.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

TILE = 4  # results along each side of a tile; 6 inputs, since neighbouring tiles share two
LEAST_CHANNELS = 64  # below, moving tiles costs more than the products that it saves
LEAST_TILES = 32  # below, taking the weights to the 36 coordinates does


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
    if quicker:
        return Winograd.apply(x, conv.weight, conv.bias)
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


class Winograd(torch.autograd.Function):
    """x (b, c, h, w), weight (c', c, 3, 3), bias (c',) -> (b, c', h, w) in channels_last memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = weight.shape[0]
        inputs = transform_input(x)  # (36, n, c)
        products = torch.bmm(inputs, transform_weight(weight).transpose(1, 2))  # (36, n, c')
        ctx.save_for_backward(inputs, weight)
        ctx.shape = x.shape
        b, _, h, w = x.shape
        results = (TO_RESULT @ products.view(36, -1)).view(TILE, TILE, b, h // TILE, w // TILE, out)
        y = results.permute(2, 3, 0, 4, 1, 5).reshape(b, h, w, out).add_(bias)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        b, c, h, w = ctx.shape
        out = weight.shape[0]
        grad = grad.permute(0, 2, 3, 1)  # (b, h, w, c')
        tiles = grad.reshape(b, h // TILE, TILE, w // TILE, TILE, out).permute(2, 4, 0, 1, 3, 5)
        products = (TO_RESULT.t() @ tiles.reshape(TILE**2, -1)).view(36, -1, out)
        in_weight = torch.bmm(products.transpose(1, 2), inputs)  # (36, c', c)
        grad_weight = (FROM_WEIGHT.t() @ in_weight.view(36, -1)).view(3, 3, out, c).permute(2, 3, 0, 1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            in_inputs = torch.bmm(products, transform_weight(weight))  # (36, n, c)
            grad_x = add_tiles((FROM_INPUT.t() @ in_inputs.view(36, -1)).view(6, 6, b, h // TILE, w // TILE, c))
        return grad_x, grad_weight, grad.sum(dim=(0, 1, 2))


def transform_input(x: Tensor) -> Tensor:
    """x (b, c, h, w) -> (36, n, c): each of its n overlapping 6 x 6 tiles in the 36 coordinates."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, c)
    tiles = padded.unfold(1, 6, TILE).unfold(2, 6, TILE)  # (b, h/4, w/4, c, 6, 6)
    return (FROM_INPUT @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)).view(36, -1, c)


def transform_weight(weight: Tensor) -> Tensor:
    """weight (c', c, 3, 3) -> (36, c', c)."""
    out, c = weight.shape[:2]
    return (FROM_WEIGHT @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, out, c)


def add_tiles(tiles: Tensor) -> Tensor:
    """Overlapping tiles (6, 6, b, h/4, w/4, c), summed where they overlap -> (b, c, h, w)."""
    b, rows, columns, c = tiles.shape[2:]
    padded = tiles.new_zeros(b, rows + 1, TILE, columns + 1, TILE, c)
    view = padded.permute(2, 4, 0, 1, 3, 5)  # (4, 4, b, rows + 1, columns + 1, c)
    view[:, :, :, :-1, :-1] = tiles[:4, :4]
    view[:2, :, :, 1:, :-1] += tiles[4:, :4]  # a tile's last two rows are its lower neighbour's first two
    view[:, :2, :, :-1, 1:] += tiles[:4, 4:]
    view[:2, :2, :, 1:, 1:] += tiles[4:, 4:]
    whole = padded.view(b, TILE * (rows + 1), TILE * (columns + 1), c)
    return whole[:, 1 : TILE * rows + 1, 1 : TILE * columns + 1].permute(0, 3, 1, 2)
