"""Attention over the positions of a feature map: cross-attention transformers, and the older AttentionBlock.

A map (b, c, h, w) in channels_last memory and its tokens (b, h*w, c) are the same bytes, so going from one to the
other costs nothing there; in contiguous memory it is a transpose. Module names are those of the original state dicts
(see ldm/models/unet.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a map, (b, c, h, w) -> the same (Rombach et al. 2022, E.2.1)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        depth: int,
        context_dim: int | None,
        cross_only: bool,
        linear: bool,
        groups: int,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        ones = 0 if linear else 2  # a 1x1 convolution in the older models
        self.proj_in = Pointwise(channels, channels, ones)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, cross_only) for _ in range(depth)
        )
        self.proj_out = zeroed(Pointwise(channels, channels, ones))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        tokens = self.proj_in(to_tokens(self.norm(x)))  # (b, h*w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_map(self.proj_out(tokens), x)


class TransformerBlock(nn.Module):
    """Attention within the map, attention to the context, two linear layers, each added: (b, l, c) -> the same.

    Without a context the second attention stays within the map too.
    """

    def __init__(self, channels: int, heads: int, context_dim: int | None, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = Attention(channels, heads, context_dim if cross_only else None)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.cross_only else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """x (b, l, c) attends to a context (b, m, d), or to itself without one: (b, l, c)."""

    def __init__(self, channels: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            split_heads(project(tokens), self.heads)
            for project, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class FeedForward(nn.Module):
    """Two linear layers with GEGLU between them (Shazeer 2020), the gate an exact GELU: (b, l, c) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # the positions 0 and 2 are the original's; dropout, always 0 in the released models, stood between them
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class GEGLU(nn.Module):
    """(b, l, c) -> (b, l, inner): the first half of a projection times the GELU of its second half."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class AttentionBlock(nn.Module):
    """Self-attention over a map's positions, added to it: (b, c, h, w) -> the same (unconditional models).

    The released models keep the projection's channels as (head, qkv, c); `qkv_first` keeps them as (qkv, head, c).
    """

    def __init__(self, channels: int, heads: int, qkv_order: str, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_first = qkv_order == "qkv_first"
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.proj_out = zeroed(Pointwise(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend_packed(self.qkv(to_tokens(self.norm(x))), self.heads, self.qkv_first)  # (b, h*w, c)
        return x + to_map(self.proj_out(mixed), x)


class AttentionPool(nn.Module):
    """A map (b, c, h, w) -> (b, out): its mean, as one more position, attends to all (Radford et al. 2021)."""

    def __init__(self, channels: int, heads: int, out: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj = Pointwise(channels, 3 * channels, 1)
        self.c_proj = Pointwise(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (b, 1 + h*w, c)
        tokens = tokens + self.positional_embedding.t()
        return self.c_proj(attend_packed(self.qkv_proj(tokens), self.heads, qkv_first=True)[:, 0])


class Pointwise(nn.Linear):
    """A linear layer over tokens whose weight may have the shape of a convolution of size 1: (out, c, 1, ...).

    So it loads what the original calls a convolution; the numbers are the same. On a processor, the backward pass of
    a 1x1 convolution takes up to three times as long as that of the matrix product.
    """

    def __init__(self, channels: int, out: int, ones: int) -> None:
        super().__init__(channels, out)
        self.weight = nn.Parameter(self.weight.detach().reshape(out, channels, *[1] * ones))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.flatten(1), self.bias)


def attend_packed(qkv: Tensor, heads: int, qkv_first: bool) -> Tensor:
    """Self-attention from one projection (b, l, 3c), kept as (qkv, head, c) or (head, qkv, c): (b, l, c)."""
    if qkv_first:
        q, k, v = (split_heads(part, heads) for part in qkv.chunk(3, dim=2))
    else:
        q, k, v = split_heads(qkv, heads).chunk(3, dim=3)
    return join_heads(F.scaled_dot_product_attention(q, k, v))


def to_tokens(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h*w, c)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(b, h*w, c) -> (b, c, h, w) with the sides of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, l, heads*c) -> (b, heads, l, c)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, heads, l, c) -> (b, l, heads*c)."""
    return x.transpose(1, 2).flatten(2)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its parameters at zero, so that what it is added to passes unchanged before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
