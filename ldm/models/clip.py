"""CLIP (Radford et al. 2021): frozen text towers for conditioning, both towers for scores, the tokenizer.

All use of open_clip is here. Nothing is downloaded: weights and vocabularies are files that the settings name, or that
come with the package.

A model of Stable Diffusion's family reads one tower or two. Each differs in where it is tapped (the last state or the
one before it), in whether the final norm follows, and in what stands after the end of a caption: token 49407 in the
towers of OpenAI, 0 in those of OpenCLIP. The mask is causal, but the context keeps all positions, so that matters.
Tokens come padded with 0, and each tower puts its own token there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.config import ClipConfig, ClipTowerConfig, TextEncoderConfig
from ldm.models.tokenizer import Tokenizer, check_size, read_checked


class ClipTextEncoder(nn.Module):
    """Tokens (b, l) -> context (b, l, d), the towers' states side by side. It is frozen and stays so.

    Modules are named towers.<name>.*, and below that as in open_clip.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.towers = nn.ModuleDict({name: _make_tower(config, tower) for name, tower in config.towers.items()})
        if config.weights is not None:
            _load(self, config.weights, "text_encoder.weights")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ClipTextEncoder:
        """Frozen: it stays in evaluation mode when the model around it trains."""
        return super().train(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encode(tokens)[0]

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (b, l) -> context (b, l, d), and the pooled output (b, k) of those towers that have one."""
        if tokens.shape[1] != self.config.length:
            raise ValueError(
                f"tokens are {tokens.shape[1]} long; CLIP reads {self.config.length} (text_encoder.length)"
            )
        # The end of the caption has the highest id, and argmax gives the first of several.
        end = tokens.argmax(dim=1)
        contexts, pooled = [], []
        for name, tower in self.towers.items():
            context, pool = _run_tower(tower, self.config.towers[name], tokens, end)
            contexts.append(context)
            pooled += [] if pool is None else [pool]
        return torch.cat(contexts, dim=2), torch.cat(pooled, dim=1) if pooled else None


def _make_tower(config: TextEncoderConfig, tower: ClipTowerConfig) -> nn.Module:
    from open_clip.transformer import QuickGELU, TextTransformer

    return TextTransformer(
        context_length=config.length,
        vocab_size=config.vocab_size,
        width=tower.width,
        heads=tower.heads,
        layers=tower.layers,
        output_dim=tower.projection,
        act_layer={"gelu": nn.GELU, "quick_gelu": QuickGELU}[tower.activation],
    )


def _run_tower(tower: nn.Module, config: ClipTowerConfig, tokens: Tensor, end: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (b, l), ends of the captions (b,) -> states (b, l, width), pooled output (b, projection) or None."""
    after = torch.arange(tokens.shape[1], device=tokens.device) > end[:, None]
    x = tower.token_embedding(tokens.masked_fill(after, config.pad)) + tower.positional_embedding
    states = [x]
    for block in tower.transformer.resblocks:
        x = block(x, attn_mask=tower.attn_mask)
        states.append(x)
    context = states[len(states) - 1 - config.skip_layers]
    if config.final_norm:
        context = tower.ln_final(context)
    if tower.text_projection is None:
        return context, None
    last = tower.ln_final(x)[torch.arange(len(x), device=x.device), end]  # (b, width)
    return context, last @ tower.text_projection


def check(config: TextEncoderConfig) -> None:
    """Refuse settings that describe no encoder, naming the value found and the one expected."""
    if not config.towers:
        raise ValueError('text_encoder.towers is empty; kind "clip" needs at least one')
    width = sum(tower.width for tower in config.towers.values())
    if config.width != width:
        raise ValueError(f"text_encoder.width is {config.width}; the towers make {width}")
    for name, tower in config.towers.items():
        where = f"text_encoder.towers.{name}"
        if tower.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f'{where}.activation is "{tower.activation}"; it is "gelu" or "quick_gelu"')
        if not 0 <= tower.skip_layers < tower.layers:
            raise ValueError(f"{where}.skip_layers is {tower.skip_layers}; the tower has {tower.layers} layers")
        if tower.width % tower.heads:
            raise ValueError(f"{where}.width is {tower.width}; {tower.heads} heads do not divide it")


# ---- the tokenizer ----------------------------------------------------------------------------------------
def clip_tokenizer(config: TextEncoderConfig) -> Tokenizer:
    """CLIP's byte pairs (Sennrich et al. 2016), padded with 0; open_clip's own list of pairs is checked too."""
    from open_clip.tokenizer import default_bpe

    if config.vocab_sha256 is None:
        raise ValueError("text_encoder.vocab_sha256 must be set: it says which list of byte pairs is meant")
    path = Path(config.vocab_file if config.vocab_file is not None else default_bpe())
    read_checked(path, config.vocab_sha256, "open_clip brings it: leave text_encoder.vocab_file null")
    pairs = BytePairs(path)
    size = len(pairs.tokenizer.encoder)
    check_size(config, size)
    return Tokenizer(pairs.ids, start=size - 2, end=size - 1, pad=0, length=config.length, vocab_size=size)


class BytePairs:
    """open_clip's tokenizer, without its cache of every word it has ever seen."""

    cached_words = 100_000

    def __init__(self, path: Path) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(str(path))
        self._specials = dict(self.tokenizer.cache)

    def ids(self, caption: str) -> list[int]:
        """The tokens of a caption without start, end and padding."""
        if len(self.tokenizer.cache) > self.cached_words:
            self.tokenizer.cache = dict(self._specials)
        return self.tokenizer.encode(caption)


# ---- both towers, for scores ------------------------------------------------------------------------------
class Clip(nn.Module):
    """Pictures and captions -> unit vectors whose products say how well they fit each other. Frozen."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        import open_clip

        name = _architecture(config.model)
        # Without `pretrained` and with `load_weights` off, nothing is looked for on the network.
        self.model = open_clip.create_model(name, pretrained=None, load_weights=False, pretrained_text=False)
        if config.weights is not None:
            _load(self.model, config.weights, "weights")
        self.tokenize = open_clip.get_tokenizer(name)
        """Captions -> tokens (b, l)."""
        self.preprocess = open_clip.image_transform(
            self.model.visual.image_size,
            is_train=False,
            mean=getattr(self.model.visual, "image_mean", None),
            std=getattr(self.model.visual, "image_std", None),
        )
        """A PIL picture -> (3, h, w), resized, cropped and normalised as the model wants it."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Clip:
        """Frozen: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """Preprocessed pictures (b, 3, h, w) -> unit vectors (b, k)."""
        return self.model.encode_image(pictures, normalize=True)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) -> unit vectors (b, k)."""
        return self.model.encode_text(tokens, normalize=True)


def _architecture(model: str) -> str:
    """The name by which open_clip knows an architecture; a JSON file is made known to it first."""
    import open_clip

    if model.endswith(".json"):
        if not Path(model).is_file():
            raise FileNotFoundError(f"there is no CLIP architecture at {model}")
        open_clip.add_model_config(model)
        return Path(model).stem
    if model not in open_clip.list_models():
        raise ValueError(f'open_clip knows no architecture "{model}"; `open_clip.list_models()` names those it knows')
    return model


def _load(module: nn.Module, weights: str, key: str) -> None:
    """A safetensors file into a module, strictly."""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there are no CLIP weights at {weights} ({key})")
    state = {name: value.float() for name, value in load_file(weights).items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} ({key}) does not fit: {' '.join(str(error).split())}") from error
