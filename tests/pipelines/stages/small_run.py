"""A run that has come to `train`, put on disk by hand: two latent shards, a selection, a tiny autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ldm.config import AutoencoderConfig, AutoencoderSettings, TinyConfig
from ldm.models.autoencoder import make_autoencoder
from ldm.shards import ShardWriter, encode_array
from pipelines.dag import How, Job
from pipelines.manifest import StageFolder, sum_funnel
from pipelines.selection import write_selection

CAPTIONS = ["cat", "dog", "red apple", "house", "zebra", "green tree", "moon", "blue fish"]
NOT_USED = 6  # the sample that the selection leaves out
SHAPE = (4, 8, 8)
SCALE_FACTOR = 0.5

NETWORK = AutoencoderConfig(
    kind="tiny", posterior="kl", factor=8, latent_channels=4, compvis=None,
    tiny=TinyConfig(image_low=-1.0, latent_clamp=None, patch=8, encoder_widths=[8], encoder_blocks=[1],
                    decoder_widths=[8], decoder_blocks=[1], block_convs=2, lowest_norm=False),
)  # fmt: skip


def latents() -> torch.Tensor:
    """The scaled means (8, c, h, w) of the samples."""
    return torch.randn(len(CAPTIONS), *SHAPE, generator=torch.Generator().manual_seed(7)).half().float() * SCALE_FACTOR


def make_run(run: Path) -> dict[str, StageFolder]:
    """precompute_latents and train of a run; train has no checkpoint yet."""
    cache, train = StageFolder(run / "precompute_latents", "precompute_latents"), StageFolder(run / "train", "train")
    records = [_write_shard(cache, shard, range(4 * shard, 4 * shard + 4)) for shard in range(2)]
    cache.close("f", records, sum_funnel(records))
    used = np.arange(len(CAPTIONS)) != NOT_USED
    with train.attempt(None, "f") as attempt:
        write_selection(attempt.path / "selection.parquet", {0: used[:4], 1: used[4:]})
        attempt.commit(rows=8, samples=7, dropped={"near_duplicate": 1}, inputs={})
    return {"precompute_latents": cache, "train": train}


def _write_shard(cache: StageFolder, shard: int, members: range) -> Any:
    logvar = np.full(SHAPE, -9.0, np.float16)
    means = (latents() / SCALE_FACTOR).half().numpy()
    with cache.attempt(shard, "f") as attempt:
        (attempt.path / "64").mkdir()
        writer = ShardWriter(attempt.path / f"64/{shard:06d}.tar", attempt.path / f"64/{shard:06d}.index")
        for i in members:
            moments = encode_array(np.concatenate([means[i], logvar]))
            writer.write(f"{shard:06d}{i:02d}", {"moments.npy": moments, "txt": CAPTIONS[i].encode()})
        writer.close()
        return attempt.commit(rows=len(members), samples=len(members), dropped={}, inputs={})


def autoencoder(folder: Path) -> AutoencoderSettings:
    """A small autoencoder with fixed random weights."""
    torch.manual_seed(0)
    path = folder / "autoencoder.safetensors"
    save_file(make_autoencoder(NETWORK).state_dict(), path)
    return AutoencoderSettings(network=NETWORK, weights=str(path), scale_factor=SCALE_FACTOR)


def make_job(run: Path, stage: str, what: Mapping[str, Any], inputs: Mapping[str, StageFolder]) -> Job:
    """The job of a stage that keeps one folder for each fingerprint."""
    cluster: Any = SimpleNamespace(whole_threads=1)  # all that these stages ask of it
    how = How(cluster, tracking=None, connect=None, run=str(run))  # type: ignore[arg-type]
    return Job(stage, dict(what), "f" * 64, StageFolder(run / stage / "12345678", stage), dict(inputs), how)
