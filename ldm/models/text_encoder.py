"""The text encoder that is trained together with the U-Net (Rombach et al. 2022, Sec. 4.3.1 and E.2).

A pre-norm transformer encoder with learned positions. It has no attention mask: padding attends and is
attended to, so the empty caption is a caption like any other, and guidance needs nothing special.

The original also owns a layer from context to vocabulary, `to_logits`, that is never run: a parameter without
a gradient would stall ZeRO. It is left out here, and put back by ldm/interop when weights are written in the
original layout.
"""

from __future__ import annotations

from torch import Tensor, arange, nn
from torch.nn import functional as F

from ldm.config import TextEncoderConfig


class TextEncoder(nn.Module):
    """Tokens (b, l) int64 -> context (b, l, d)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.head_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.config.length:
            raise ValueError(
                f"tokens are {length} long; this text encoder has {self.config.length} positions (text_encoder.length)"
            )
        positions = arange(length, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (b, l, d)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """Self-attention, then two linear layers, each added to what came in: (b, l, d) -> the same."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, head_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SelfAttention(nn.Module):
    """Every position attends to every position: (b, l, d) -> the same."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width  # 8 x 64 in the 1.45B model, whose width is 1280
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )  # (b, heads, l, head_width) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def make_text_encoder(config: TextEncoderConfig) -> nn.Module:
    """The text encoder of a configuration, tokens (b, l) -> context (b, l, d), with random weights."""
    if config.kind == "transformer":
        return TextEncoder(config)
    if config.kind == "clip":
        from ldm.models.clip import ClipTextEncoder

        return ClipTextEncoder(config)
    raise ValueError(f'text_encoder.kind is "{config.kind}"; it is "transformer" or "clip"')


def check(config: TextEncoderConfig) -> None:
    """Refuse settings that describe no network, naming the value found and the one expected."""
    for name in ("vocab_size", "length", "width", "layers", "heads", "head_width"):
        value = getattr(config, name)
        if value is None or value < 1:
            raise ValueError(f'text_encoder.{name} is {value}; kind "transformer" needs a positive integer')
