"""The paper's autoencoders: image -> moments or latent -> image (Rombach et al. 2022, Sec. 3.1 and App. G).

Module names are those of the original state dicts. Where the numbers allow it the work is less than there:

- enlarging before a convolution repeats every pixel four times, so each output reads only 2x2 different ones:
  four small convolutions of summed weights do the same with 4/9 of the multiplications (see Upsample);
- without gradients SiLU and the sums of residual blocks write where they read.

`make_autoencoder` also makes the small ones of ldm/models/tiny_autoencoder.py; both kinds have `config`, `factor`,
`latent_channels`, `encode` and `decode`. Large pictures go through ldm/models/tiling.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import AutoencoderConfig, AutoencoderSettings
from ldm.models.quantize import Codebook
from ldm.models.tiny_autoencoder import TinyAutoencoder


class Autoencoder(nn.Module):
    """Image (b, 3, H, W) in [-1, 1] -> moments or latent -> image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.factor = config.factor
        self.latent_channels = c = config.latent_channels
        encoded = 2 * c if config.posterior == "kl" else c
        self.encoder = Encoder(config, encoded)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(encoded, encoded, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.quantize = Codebook(config.compvis.codes, c) if config.posterior == "vq" else None

    def encode(self, image: Tensor) -> Tensor:
        """Image (b, 3, H, W) -> moments (b, 2c, h, w) for posterior "kl", else latent (b, c, h, w), not quantised."""
        _, channels, height, width = image.shape
        if channels != 3 or height % self.factor or width % self.factor:
            raise ValueError(
                f"a picture of {channels} channels, {height}x{width}, cannot be encoded: it must have 3, and both "
                f"sides must be multiples of {self.factor}"
            )
        return self.quant_conv(self.encoder(image))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent (b, c, h, w) -> image (b, 3, H, W), near [-1, 1] but not cut to it; VQ quantises first."""
        if z.shape[1] != self.latent_channels:
            raise ValueError(
                f"a latent of {z.shape[1]} channels cannot be decoded by an autoencoder of {self.latent_channels} "
                "(autoencoder.network.latent_channels)"
            )
        if self.quantize is not None:
            z = self.quantize(z)
        return self.decode_quantized(z)

    def decode_quantized(self, z: Tensor) -> Tensor:
        """The same without quantising, for training and for interpolation."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, image: Tensor) -> Tensor:
        """Image -> image through the mean of the posterior."""
        return self.decode(self.encode(image)[:, : self.latent_channels])


class Encoder(nn.Module):
    """Image (b, 3, H, W) -> (b, out, H/factor, W/factor)."""

    def __init__(self, config: AutoencoderConfig, out: int) -> None:
        super().__init__()
        sizes = config.compvis
        widths = [sizes.channels * m for m in sizes.channel_mult]
        self.conv_in = _conv(3, widths[0])
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            stage = Level(before, width, sizes.num_res_blocks, 2**level in sizes.attention_factors)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Middle(widths[-1], sizes.middle_attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], out)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """z (b, c, h, w) -> image (b, 3, h*factor, w*factor)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        sizes = config.compvis
        widths = [sizes.channels * m for m in sizes.channel_mult]
        self.conv_in = _conv(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], sizes.middle_attention)
        self.up = nn.ModuleList()  # up[0] has the highest resolution, and runs last
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            stage = Level(before, width, sizes.num_res_blocks + 1, 2**level in sizes.attention_factors)
            if level > 0:
                stage.upsample = Upsample(width)
            self.up.append(stage)
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention or none, then a change of resolution or none."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(out) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution: (b, c, h, w) -> the same."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nn.Module):
    """Two norm-SiLU-convolution layers, added to what came in: (b, c, h, w) -> (b, out, h, w)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv(channels, out)
        self.norm2 = _norm(out)
        self.conv2 = _conv(out, out)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        x = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return h + x if torch.is_grad_enabled() else h.add_(x)


class Attention(nn.Module):
    """Every position attends to every other with one head, added to what came in: (b, c, h, w) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # (b, 1, l, c)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """(b, c, h, w) -> (b, c, h/2, w/2); one row and one column are padded, below and to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(b, c, h, w) -> (b, c, 2h, 2w): nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # twice as fast there; not measured elsewhere
            return enlarged_conv(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest enlarging and a 3x3 convolution in one: x (b, c, h, w) -> (b, out, 2h, 2w).

    Of the three rows that an output reads two are copies of one: their weights are summed, and four 2x2
    convolutions, one for each position within an enlarged pixel, do the same with 4/9 of the multiplications.
    """
    b, _, h, w = x.shape
    x = F.pad(x, (1, 1, 1, 1))
    last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((b, len(weight), 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=memory_format)
    for i, weight_i in enumerate(_summed(weight, 2)):
        for j, weight_ij in enumerate(_summed(weight_i, 3)):
            y[:, :, i::2, j::2] = F.conv2d(x[:, :, i : i + h + 1, j : j + w + 1], weight_ij, bias)
    return y


def _summed(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along a dimension -> two, for the first and the second half of an enlarged pixel."""
    before, middle, after = weight.unbind(dim)
    return torch.stack([before, middle + after], dim), torch.stack([before + middle, after], dim)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


def check(config: AutoencoderConfig) -> None:
    """Refuse settings that describe no network, naming the value found and the one expected."""
    name, sizes = "autoencoder.network", config.compvis
    if sizes is None:
        raise ValueError(f'{name}.compvis is null; kind "compvis" needs it')
    if config.posterior not in ("kl", "vq", "none"):
        raise ValueError(f'{name}.posterior is "{config.posterior}"; it is "kl", "vq" or "none"')
    factor = 2 ** (len(sizes.channel_mult) - 1)
    if config.factor != factor:
        levels = len(sizes.channel_mult)
        raise ValueError(f"{name}.factor is {config.factor}; the {levels} levels of channel_mult make {factor}")
    if (config.posterior == "vq") != (sizes.codes is not None):
        raise ValueError(f'{name}.compvis.codes is {sizes.codes}; posterior "vq" needs it, and only that one')
    wrong = [f for f in sizes.attention_factors if f not in [2**i for i in range(len(sizes.channel_mult))]]
    if wrong:
        raise ValueError(f"{name}.compvis.attention_factors has {wrong}; the levels have powers of 2 up to {factor}")
    if sizes.channels % 32:
        raise ValueError(f"{name}.compvis.channels is {sizes.channels}; the norms need a multiple of 32")


# ---- making and loading -----------------------------------------------------------------------------------
def make_autoencoder(config: AutoencoderConfig) -> Autoencoder | TinyAutoencoder:
    """The autoencoder of a configuration, with random weights."""
    kinds = {"compvis": Autoencoder, "tiny": TinyAutoencoder}
    if config.kind not in kinds:
        raise ValueError(f'autoencoder.network.kind is "{config.kind}"; it is "compvis" or "tiny"')
    return kinds[config.kind](config)


def load_autoencoder(config: AutoencoderSettings, device: torch.device | str) -> Autoencoder | TinyAutoencoder:
    """The frozen autoencoder of a safetensors file, float32; a key too few, too many or of another shape raises."""
    path = Path(config.weights)
    if not path.is_file():
        raise FileNotFoundError(f"there are no autoencoder weights at {path} (autoencoder.weights)")
    with torch.device("meta"):
        autoencoder = make_autoencoder(config.network)
    expected = {key: tuple(value.shape) for key, value in autoencoder.state_dict().items()}
    with safe_open(path, "pt", device=str(device)) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        check_keys(found, expected, path)
        state = {key: file.get_tensor(key).float() for key in expected}
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.eval().requires_grad_(False)


def check_keys(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises ValueError naming every key that is missing, unexpected or of another shape."""
    problems = [f"{key} is missing" for key in expected.keys() - found.keys()]
    problems += [f"{key} is unexpected" for key in found.keys() - expected.keys()]
    problems += [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in found.keys() & expected.keys()
        if found[key] != expected[key]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(
            f"{path} does not fit autoencoder.network: {shown}. `python -m pipelines.inspect path={path}` says "
            "which configuration it fits"
        )


# ---- the posterior ----------------------------------------------------------------------------------------
def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (b, 2c, h, w) -> mean and log-variance (b, c, h, w), the latter cut to [-30, 20]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def draw_latent(moments: Tensor, eps: Tensor, scale_factor: float) -> Tensor:
    """Moments (b, 2c, h, w), noise (b, c, h, w) -> z0 = scale_factor * (mean + std * eps) (Kingma & Welling 2014).

    A latent (b, c, h, w), as VQ and deterministic autoencoders have it, is only scaled.
    """
    if moments.shape == eps.shape:
        return scale_factor * moments.float()
    mean, logvar = split_moments(moments.float())
    if mean.shape != eps.shape:
        raise ValueError(
            f"moments {tuple(moments.shape)} and noise {tuple(eps.shape)} do not fit: moments have twice the channels"
        )
    return scale_factor * (mean + torch.exp(logvar / 2) * eps)


def gaussian_kl(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """KL divergence of one diagonal Gaussian from another, for each element, in nats."""
    difference = (mean - other_mean).square() * torch.exp(-other_logvar)
    return 0.5 * (other_logvar - logvar - 1 + torch.exp(logvar - other_logvar) + difference)


def posterior_kl(moments: Tensor) -> Tensor:
    """KL divergence of the posterior from a standard normal, summed over each sample: (b, 2c, h, w) -> (b,)."""
    mean, logvar = split_moments(moments)
    zero = torch.zeros_like(mean)
    return gaussian_kl(mean, logvar, zero, zero).flatten(1).sum(1)
