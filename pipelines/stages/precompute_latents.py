"""Encodes every kept picture once with the frozen autoencoder and caches its moments.

download/000042.tar + filter_images/000042.parquet -> precompute_latents/256/000042.tar, 000042.index

Samples are {key.moments.npy fp16, key.txt}; a folder for each resolution, so that a 256 px run never reads the bytes of
another.

Moments are stored unscaled, for the trainer to draw fresh noise and scale; captions are stored whole. A shard's bytes
depend on its input and its settings only: batches are padded to one fixed size, thread count and memory format are set
in every call (on a processor other values change the last bits). Some samples of every shard are decoded back and
compared with their picture, which catches a wrong normalisation or a wrong scale before weeks are spent on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from ldm.config import AutoencoderSettings
from ldm.images import decode_rgb, resize_and_crop, to_tensor
from ldm.models.autoencoder import load_autoencoder
from ldm.shards import ShardWriter, encode_array, iterate_tar
from pipelines.dag import Job, weights_path
from pipelines.manifest import Record, shard_name
from pipelines.stages.filter_images import picture_of


class Worker:
    """Holds the autoencoder on one device; lives as long as the stage."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = job.what["dataset.precompute_latents"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.autoencoder = load_autoencoder(settings_of(job), self.device)
        if self.settings.channels_last:
            self.autoencoder.to(memory_format=torch.channels_last)
        self.field = "moments.npy" if self.autoencoder.config.posterior == "kl" else "latent.npy"

    def run_shard(self, shard: int) -> Record:
        """Encodes the kept pictures of one shard and commits their moments."""
        # A reused process keeps the thread count of its first task, and other counts give other bytes.
        torch.set_num_threads(self.settings.threads)
        job, name = self.job, shard_name(shard)
        records = {read: job.inputs[read].record(shard) for read in ("download", "filter_images")}
        for read, record in records.items():
            if record is None:
                raise FileNotFoundError(f"{read} has no shard {name}; run +stage={read} first")
        folder = str(self.settings.resolution)
        with job.output.attempt(shard, job.fingerprint) as attempt:
            (attempt.path / folder).mkdir()
            facts = self._encode(shard, attempt.path / folder / f"{name}.tar", attempt.path / folder / f"{name}.index")
            inputs = {f"{read}/{name}": record.digest for read, record in records.items()}
            if "train_autoencoder" in job.inputs:
                inputs["train_autoencoder"] = job.inputs["train_autoencoder"].record().digest
            kept = records["filter_images"].samples
            return attempt.commit(rows=kept, samples=facts["samples"], dropped={}, inputs=inputs, facts=facts)

    def _encode(self, shard: int, tar: Any, index: Any) -> dict[str, Any]:
        """Writes the latents of a shard; returns what was measured on them."""
        writer = ShardWriter(tar, index)
        total, squares, count, psnrs = 0.0, 0.0, 0, []
        for keys, captions, image in self._batches(shard):
            moments = self._moments(image)
            if len(psnrs) < self.settings.check_samples:
                psnrs += self._psnr(image, moments)[: self.settings.check_samples - len(psnrs)]
            stored = moments.to(torch.float16).cpu().numpy()
            if not np.isfinite(stored).all():
                raise ValueError(f"shard {shard}: moments overflow fp16 or are not finite, in the batch from {keys[0]}")
            mean = stored[:, : self.autoencoder.latent_channels].astype(np.float64)
            total, squares, count = total + mean.sum(), squares + (mean**2).sum(), count + mean.size
            for key, caption, array in zip(keys, captions, stored, strict=True):
                writer.write(key, {self.field: encode_array(array), "txt": caption})
        writer.close()
        self._check_psnr(shard, psnrs)
        center = total / max(count, 1)
        return {
            "samples": len(writer.rows),
            "latent_side": self.settings.resolution // self.autoencoder.factor,
            "psnr": round(float(np.mean(psnrs)), 3) if psnrs else None,
            "mean": round(center, 6),
            "std": round(float(np.sqrt(max(squares / max(count, 1) - center**2, 0.0))), 6),
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def _batches(self, shard: int) -> Iterator[tuple[list[str], list[bytes], torch.Tensor]]:
        """(keys, captions, image (b, 3, H, W) in [-1, 1]) of the kept pictures in key order."""
        name = shard_name(shard)
        table = pq.read_table(self.job.inputs["filter_images"] / f"{name}.parquet", columns=["key", "verdict"])
        kept = {row["key"] for row in table.to_pylist() if not row["verdict"]}
        keys, captions, images = [], [], []
        for key, fields in iterate_tar(self.job.inputs["download"] / f"{name}.tar"):
            if key not in kept:
                continue
            keys.append(key)
            captions.append(fields["txt"])
            images.append(to_tensor(resize_and_crop(decode_rgb(picture_of(fields)), self.settings.resolution)))
            if len(keys) == self.settings.batch_size:
                yield keys, captions, torch.stack(images)
                keys, captions, images = [], [], []
        if keys:
            yield keys, captions, torch.stack(images)

    @torch.inference_mode()
    def _moments(self, image: torch.Tensor) -> torch.Tensor:
        """image (b, 3, H, W) -> moments (b, 2c, h, w) or latent (b, c, h, w), float32, encoded in a padded batch."""
        padding = self.settings.batch_size - len(image)
        padded = torch.cat([image, image[-1:].expand(padding, -1, -1, -1)]) if padding else image
        padded = padded.to(self.device)
        if self.settings.channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        return self.autoencoder.encode(padded)[: len(image)].float()

    @torch.inference_mode()
    def _psnr(self, image: torch.Tensor, moments: torch.Tensor) -> list[float]:
        """Peak signal to noise ratio, in dB, of each picture decoded back from its stored form."""
        z = moments.to(torch.float16).float()[:, : self.autoencoder.latent_channels]
        decoded = self.autoencoder.decode(z).clamp(-1, 1).cpu()
        error = (decoded - image).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        return (10 * torch.log10(4 / error)).tolist()

    def _check_psnr(self, shard: int, psnrs: list[float]) -> None:
        if psnrs and np.mean(psnrs) < self.settings.min_psnr:
            raise ValueError(
                f"shard {shard}: pictures decoded back from their latents reach {np.mean(psnrs):.1f} dB, expected at "
                f"least {self.settings.min_psnr} dB (dataset.precompute_latents.min_psnr): these weights do not fit "
                f"these pictures, or their normalisation is wrong"
            )


def settings_of(job: Job) -> AutoencoderSettings:
    """The autoencoder that encodes: its weights are given, or made by train_autoencoder. Nothing is scaled here."""
    given = job.what["autoencoder.weights"]
    path = weights_path(given) if given is not None else job.inputs["train_autoencoder"] / "autoencoder.safetensors"
    return AutoencoderSettings(network=job.what["autoencoder.network"], weights=str(path), scale_factor=1.0)
