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
MIXED_CAPTIONS = [f"photo of a {thing}" for thing in ("cat", "cow", "car", "cup", "cap", "can", "cub", "cog")]
NOT_USED = 6  # the sample that the selection leaves out
SHAPE = (4, 8, 8)
SCALE_FACTOR = 0.5

NETWORK = AutoencoderConfig(
    kind="tiny", posterior="kl", factor=8, latent_channels=4, compvis=None,
    tiny=TinyConfig(image_low=-1.0, latent_clamp=None, patch=8, encoder_widths=[8], encoder_blocks=[1],
                    decoder_widths=[8], decoder_blocks=[1], block_convs=2, lowest_norm=False),
)  # fmt: skip


def latents(seed: int = 7) -> torch.Tensor:
    """The scaled means (8, c, h, w) of the samples."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(CAPTIONS), *SHAPE, generator=random).half().float() * SCALE_FACTOR


def make_run(run: Path) -> dict[str, StageFolder]:
    """precompute_latents and train of a run; train has no checkpoint yet."""
    cache, train = make_latents(run, CAPTIONS, latents()), StageFolder(run / "train", "train")
    used = np.arange(len(CAPTIONS)) != NOT_USED
    with train.attempt(None, "f") as attempt:
        write_selection(attempt.path / "selection.parquet", {0: used[:4], 1: used[4:]})
        attempt.commit(rows=8, samples=7, dropped={"near_duplicate": 1}, inputs={})
    return {"precompute_latents": cache, "train": train}


def make_latents(run: Path, captions: list[str], means: torch.Tensor) -> StageFolder:
    """precompute_latents of a run, in two shards."""
    cache = StageFolder(run / "precompute_latents", "precompute_latents")
    records = [_write_shard(cache, shard, range(4 * shard, 4 * shard + 4), captions, means) for shard in range(2)]
    cache.close("f", records, sum_funnel(records))
    return cache


def mix_in(inputs: dict[str, StageFolder], run: Path, weight: float) -> None:
    """Latents of a run "photos", as if `train` had mixed them in, all eight of them."""
    inputs["precompute_latents@photos"] = make_latents(run, MIXED_CAPTIONS, latents(8))
    inputs["train"].write_plan({"what": {"dataset.mixture": {"photos": weight}}})
    write_selection(inputs["train"] / "selection@photos.parquet", {0: np.ones(4, bool), 1: np.ones(4, bool)})


def _write_shard(cache: StageFolder, shard: int, members: range, captions: list[str], scaled: torch.Tensor) -> Any:
    logvar = np.full(SHAPE, -9.0, np.float16)
    means = (scaled / SCALE_FACTOR).half().numpy()
    with cache.attempt(shard, "f") as attempt:
        (attempt.path / "64").mkdir()
        writer = ShardWriter(attempt.path / f"64/{shard:06d}.tar", attempt.path / f"64/{shard:06d}.index")
        for i in members:
            moments = encode_array(np.concatenate([means[i], logvar]))
            writer.write(f"{shard:06d}{i:02d}", {"moments.npy": moments, "txt": captions[i].encode()})
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
    processor = SimpleNamespace(num_gpus=0)
    cluster: Any = SimpleNamespace(whole_threads=1, whole=processor, train=processor)  # all that these stages ask of it
    how = How(cluster, tracking=None, connect=None, run=str(run))  # type: ignore[arg-type]
    return Job(stage, dict(what), "f" * 64, StageFolder(run / stage / "12345678", stage), dict(inputs), how)
