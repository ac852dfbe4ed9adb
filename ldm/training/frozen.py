"""The frozen part of a model, a CLIP text tower: outside the engine, whole on every device, in its own dtype.

DeepSpeed would share it out at stage 3 and gather it again for every batch, though nothing about it ever changes. A
checkpoint keeps its hash alone: its weights come from a file of their own.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ldm.models.denoiser import Denoiser
from ldm.training.engine_config import WEIGHTS

READS = ("tokens", "layout", "sizes")  # of a condition, in the words of ldm/models/denoiser.py
ARITHMETIC = {**WEIGHTS, "bf16_autocast": torch.bfloat16}  # precision of the training -> what is computed with


def arithmetic(precision: str, device: str) -> AbstractContextManager[object]:
    """Computes as a training of that precision does, whatever dtype the weights have."""
    dtype = ARITHMETIC.get(precision)
    return torch.autocast(device, dtype) if dtype else nullcontext()


class Frozen:
    """What a condition goes through before it reaches the part of the model that is trained."""

    def __init__(self, denoiser: Denoiser, precision: str) -> None:
        """Takes the text encoder out of a denoiser where it is not trained; the denoiser then reads its context."""
        self.text_encoder: nn.Module | None = None
        self._precision = precision
        text_encoder = denoiser.text_encoder
        if text_encoder is not None and not any(p.requires_grad for p in text_encoder.parameters()):
            self.text_encoder, denoiser.text_encoder = text_encoder, None

    @torch.no_grad()
    def encode(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition with what the frozen part makes of it in place of what it reads."""
        if self.text_encoder is None:
            return condition
        read = {name: x for name, x in condition.items() if name in READS}
        rest = {name: x for name, x in condition.items() if name not in READS}
        device = next(self.text_encoder.parameters()).device.type
        with arithmetic(self._precision, device):
            return rest | Denoiser(nn.Identity(), self.text_encoder).encode_condition(read)

    def digests(self) -> dict[str, str]:
        """Which weights these are: for each part the sha256 of its names, shapes and numbers."""
        return {} if self.text_encoder is None else {"text_encoder": digest_of(self.text_encoder)}


def digest_of(module: nn.Module) -> str:
    """sha256 of names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tuple(x.shape)}\0{x.dtype}\0".encode())
        digest.update(x.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
