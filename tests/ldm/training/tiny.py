"""Small latents and small settings, so that a training run takes a second or two."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config import (
    DiffusionConfig,
    SampleGridConfig,
    TextEncoderConfig,
    TrainingConfig,
    TrainingRunConfig,
    TrainSettings,
    UNetConfig,
)
from ldm.shards import ShardInfo, ShardWriter, encode_array
from ldm.training.loader import TrainData

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
SHAPE = [2, 4, 4]

TEXT_ENCODER = TextEncoderConfig(
    canvas=None,
    kind="transformer", tokenizer="bytes", vocab_file=None, vocab_sha256=None, vocab_size=259, length=12, width=8,
    layers=1, heads=2, head_width=4, towers=None, weights=None,
)  # fmt: skip

UNET = UNetConfig(
    in_channels=2, out_channels=2, model_channels=8, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1],
    num_heads=2, num_head_channels=None, transformer_depth=[1], context_dim=8, cross_only_resolutions=[],
    linear_projections=True, qkv_order="head_first", scale_shift_norm=False, resblock_updown=False, num_classes=None,
    vector_dim=None, norm_groups=4, dropout=0.1,
)  # fmt: skip

DIFFUSION = DiffusionConfig(
    timesteps=1000, schedule="sqrt_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True, prediction="v",
    loss="l2", min_snr_gamma=None, offset_noise=0.0,
)  # fmt: skip

TRAINING = TrainingConfig(
    seed=SEED, start_from=None, resume=None, skip_samples=None, accept=None, max_steps=40, batch_size=8,
    learning_rate=3e-3, lr_schedule="cosine", warmup_steps=5,
    lr_end=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.01, gradient_clipping=1.0, caption_dropout=0.2,
    precision="float32", deterministic=False, ema_decay=0.9, ema_of="unet", lanes=4, window_shards=2, held_out_shards=0,
    validate_every_steps=None, validation_samples=0, log_every_steps=10, max_skipped_batches=0,
    grid=SampleGridConfig(every_steps=None, prompts=[], steps=2, guidance_scale=2.0),
)  # fmt: skip

RUN = TrainingRunConfig(
    threads=1, micro_batch_size=4, zero_stage=1, loader_workers=0, loader_cache_bytes=10_000_000,
    activation_checkpointing=False, compile=False, checkpoint_every_steps=20, checkpoint_every_seconds=None,
    keep_checkpoints=3, keep_every_steps=None, keep_best=False, copy_to=None, hang_seconds=None, deepspeed={},
)  # fmt: skip


def settings(diffusion: dict[str, Any] | None = None, **training: Any) -> TrainSettings:
    """The tiny settings with some values changed."""
    return TrainSettings(UNET, TEXT_ENCODER, replace(DIFFUSION, **(diffusion or {})), replace(TRAINING, **training))


def write_data(folder: Path, counts: Sequence[int], used: Sequence[Sequence[bool] | None] | None = None) -> TrainData:
    """Shards of random moments with captions; `used` says which of their samples are trained on."""
    random = np.random.default_rng(SEED)
    infos = []
    for shard, count in enumerate(counts):
        writer = ShardWriter(folder / f"{shard:06d}.tar", folder / f"{shard:06d}.index")
        for row in range(count):
            moments = random.standard_normal((2 * SHAPE[0], *SHAPE[1:]))
            moments[SHAPE[0] :] -= 6  # log-variance: nearly the same latent each time
            fields = {"moments.npy": encode_array(moments.astype(np.float16)), "txt": f"{shard} {row}".encode()}
            writer.write(f"{shard:06d}{row:03d}", fields)
        writer.close()
        sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
        infos.append(ShardInfo(str(writer.tar), str(writer.index), count, f"digest {shard}", sha256))
    bits = [
        None if mask is None else np.packbits(np.array(mask, bool)).tobytes() for mask in used or [None] * len(counts)
    ]
    return TrainData(infos, bits, "edition 1", "selection 1", "moments.npy", SHAPE, 1.0)
