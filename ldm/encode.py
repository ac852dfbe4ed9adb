"""The frozen autoencoder as a cache is made with it: fixed batch, precision, memory format and thread count.

Each of them changes the last bits of what is encoded (up to 1% of fp16 moments computed in float32, up to 80% in bf16),
so every one is set here in every call, and batches that are not full are padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.config import AutoencoderSettings
from ldm.models.autoencoder import load_autoencoder

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = torch.finfo(torch.float16).max  # 65504, of what is stored


class TooLarge(RuntimeError):
    """A batch does not fit into memory; the message names the setting and a value that fits."""

    stops_the_run = True  # all other shards are of the same size


class Encoder:
    """Holds the autoencoder on one device. image (b, 3, H, W) -> moments (b, 2c, h, w) or latent (b, c, h, w)."""

    def __init__(
        self,
        settings: AutoencoderSettings,
        device: torch.device,
        *,
        batch_size: int,
        precision: str,
        threads: int,
        channels_last: bool,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; there are: {', '.join(PRECISIONS)}")
        self.device, self.batch_size, self.threads, self.precision = device, batch_size, threads, precision
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.autoencoder = load_autoencoder(settings, device)
        self.autoencoder.to(dtype=PRECISIONS[precision], memory_format=self.memory_format)
        self.latent_channels = self.autoencoder.latent_channels

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """What is stored, as float32 on the device. Raises TooLarge, naming a batch size that fits."""
        # A reused process keeps the thread count of its first task.
        torch.set_num_threads(self.threads)
        padding = self.batch_size - len(image)
        try:
            padded = torch.cat([image, image[-1:].expand(padding, -1, -1, -1)]) if padding else image
            return self._forward(padded)[: len(image)].float()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose exception would keep what the failed call had allocated.
        raise TooLarge(self._advice(image))

    def _forward(self, image: Tensor) -> Tensor:
        image = image.to(self.device, PRECISIONS[self.precision], non_blocking=True)
        return self.autoencoder.encode(image.contiguous(memory_format=self.memory_format))

    def _advice(self, image: Tensor) -> str:
        fitting = self._largest_fitting(image)
        way = (
            f"dataset.precompute_latents.batch_size={fitting} fits; python -m pipelines.plan "
            f"+stage=precompute_latents, with the other arguments of this run, finds the fastest that does"
            if fitting
            else "not even one does: lower dataset.precompute_latents.resolution"
        )
        return f"{self._described(image, self.batch_size)} do not fit into the memory of {self.device}; {way}"

    def _described(self, image: Tensor, count: int) -> str:
        height, width = image.shape[-2:]
        return f"{count} pictures of {height}x{width} in {self.precision}"

    def _largest_fitting(self, image: Tensor) -> int:
        """The largest half, quarter and so on of a batch that can be encoded; 0 when not even one picture can."""
        size = self.batch_size // 2
        while size:
            try:
                self._forward(image[:1].expand(size, -1, -1, -1))
                return size
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            size //= 2
        return 0

    @torch.inference_mode()
    def psnr(self, image: Tensor, stored: Tensor) -> list[float]:
        """Peak signal to noise ratio, in dB, of pictures decoded back from what is stored of them (fp16)."""
        z = stored[:, : self.latent_channels].to(self.device, PRECISIONS[self.precision])
        try:
            decoded = self.autoencoder.decode(z).float().clamp(-1, 1).cpu()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            pictures = self._described(image, len(image))
            raise TooLarge(
                f"{pictures}, decoded back at once, do not fit into the memory of {self.device}; set "
                f"dataset.precompute_latents.check_samples to less than {len(image)}"
            ) from error
        error = (decoded - image).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        return (10 * torch.log10(4 / error)).tolist()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory ran out, or the machine's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class Stored:
    """What was encoded, as fp16 on its way to the processor, behind nothing that the device is asked for later."""

    def __init__(self, encoded: Tensor) -> None:
        self._half = _to_host(encoded.to(torch.float16))
        self._largest = _to_host(encoded.abs().flatten(1).amax(1))
        self._arrived = torch.cuda.current_stream(encoded.device).record_event() if encoded.is_cuda else None

    def wait(self) -> tuple[Tensor, list[float]]:
        """(what is stored, the largest size among the numbers of each sample)"""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._half, self._largest.tolist()


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory that is under way; of what is on the processor already, itself."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x


def to_stored(keys: list[str], encoded: Tensor | Stored) -> Tensor:
    """What was encoded as fp16 on the processor. Raises ValueError naming the first sample that fp16 cannot hold."""
    stored, largest = (Stored(encoded) if isinstance(encoded, Tensor) else encoded).wait()
    for key, value in zip(keys, largest, strict=True):
        if not value <= LARGEST:  # also where it is not a number
            overflow = value == value and value != float("inf")
            found = f"a number of size {value:.4g}" if overflow else "numbers that are not finite"
            way = "these weights cannot be cached" if overflow else "compute in another precision"
            raise ValueError(
                f"sample {key}: its latent has {found}, expected at most {LARGEST:.0f}, which fp16 holds; {way} "
                f"(dataset.precompute_latents.precision)"
            )
    return stored
