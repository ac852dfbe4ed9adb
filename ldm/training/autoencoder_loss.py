"""What an autoencoder is trained on: how far a picture lands from itself, and how far its latent is from a normal.

Means over pixels and over latent elements, not sums: the weight of the one against the other then means the same
at every picture size.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


def reconstruction(decoded: Tensor, image: Tensor) -> Tensor:
    """Mean |d| plus the root of the mean d^2 of each picture; decoded, image (b, 3, H, W) -> (b,).

    The first keeps plain grounds plain, the second is what PSNR counts, with every picture weighing about the same.
    """
    difference = decoded - image
    square = difference.square().mean((1, 2, 3))
    return difference.abs().mean((1, 2, 3)) + (square + 1e-8).sqrt()


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (b, 2c, h, w) -> mean and log-variance (b, c, h, w) each, the latter cut as when latents are drawn."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL from N(0, 1), mean over elements; (b, c, h, w) -> (b,) (Kingma & Welling 2014, Appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3))


def psnr(decoded: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, cut to [-1, 1]; (b, 3, H, W) twice -> (b,)."""
    error = (decoded.clamp(-1, 1) - image).square().mean((1, 2, 3)) / 4  # the peak is 2: from -1 to 1
    return -10 * torch.log10(error.clamp_min(1e-10))
