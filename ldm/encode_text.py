"""A frozen text encoder as a cache of its features is made with it: fixed batch, precision and thread count.

What a trained encoder makes of a caption changes with every step, so only a frozen one may be asked.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ldm.config import TextEncoderConfig
from ldm.encode import PRECISIONS, TooLarge, is_out_of_memory
from ldm.models.text_encoder import make_text_encoder
from ldm.models.tokenizer import make_tokenizer


class CaptionEncoder:
    """Holds the text encoder on one device. captions -> context (b, l, d)."""

    def __init__(
        self, config: TextEncoderConfig, device: torch.device, *, batch_size: int, precision: str, threads: int
    ) -> None:
        self.device, self.batch_size, self.threads = device, batch_size, threads
        self.dtype = None if precision == "float32" else PRECISIONS[precision]
        self.tokenizer = make_tokenizer(config)
        self.text_encoder = make_text_encoder(config).eval().to(device)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Tensor:
        """The context of at most a batch of captions, float32 on the device. Raises TooLarge where it does not fit."""
        torch.set_num_threads(self.threads)
        padding = self.batch_size - len(captions)
        tokens = self.tokenizer(captions + [""] * padding).to(self.device)
        try:
            with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
                return self.text_encoder(tokens)[: len(captions)].float()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TooLarge(
                f"{self.batch_size} captions of {tokens.shape[1]} tokens do not fit into the memory of {self.device}; "
                f"set batch_size to less"
            ) from error
