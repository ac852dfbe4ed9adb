"""The codebook of the VQ autoencoders (van den Oord et al. 2017; Esser et al. 2021, Sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Distances are worked out for so many pairs of position and code at once: 64 MB of float32.
PAIRS = 2**24


class Codebook(nn.Module):
    """z (b, c, h, w) -> the nearest code at each position (b, c, h, w)."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def indices(self, z: Tensor) -> Tensor:
        """z (b, c, h, w) -> indices (b, h, w) int64 of the nearest codes, the first one of equals."""
        b, c, h, w = z.shape
        # In half precision many codes are equally near: distances are always float32, autocast or not.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = self.embedding.weight.float()
            lengths = codes.square().sum(1)  # |z - e|^2 = |e|^2 - 2 z.e + |z|^2, and the last is the same for all e
            rows = z.float().permute(0, 2, 3, 1).reshape(-1, c)
            chunks = rows.split(max(1, PAIRS // len(codes)))
            return torch.cat([torch.addmm(lengths, r, codes.T, alpha=-2).argmin(1) for r in chunks]).view(b, h, w)

    def entries(self, indices: Tensor) -> Tensor:
        """Indices (b, h, w) -> codes (b, c, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor) -> Tensor:
        return self.entries(self.indices(z))


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The codes, with the gradient handed to z as if nothing had been rounded."""
    return z + (quantized - z).detach()


def codebook_loss(z: Tensor, quantized: Tensor, beta: float, legacy: bool) -> Tensor:
    """Mean squares that draw z and its codes together (van den Oord et al. 2017, Eq. 3) -> scalar.

    beta weighs how fast z follows its code. The released models were trained with it on the other term, on how
    fast a code follows z: that is `legacy`.
    """
    encoder = (quantized.detach() - z).square().mean()
    codes = (quantized - z.detach()).square().mean()
    return encoder + beta * codes if legacy else beta * encoder + codes
