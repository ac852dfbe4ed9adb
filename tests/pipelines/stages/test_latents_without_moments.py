"""Autoencoders without a posterior, through the encoding worker and back: what is cached is the latent itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.images import resize_and_crop, to_tensor
from ldm.models.autoencoder import load_autoencoder, make_autoencoder
from ldm.shards import decode_array, iterate_tar
from ldm.training.loader import Draw, Loader
from pipelines.manifest import StageFolder
from pipelines.selection import write_selection
from pipelines.stages import train
from pipelines.verify import verify
from tests.ldm.training.tiny import SEED
from tests.pipelines.small_cache import config_of, make_cache, picture

NETWORKS = {
    "vq": ["autoencoder=vq_f4", *(f"autoencoder.network.compvis.{size}" for size in
                                  ("channels=32", "num_res_blocks=1", "codes=16"))],
    "deterministic": ["autoencoder=taesd", *(f"autoencoder.network.tiny.{half}_{sizes}" for half in
                      ("encoder", "decoder") for sizes in ("widths=[8,8,8,8]", "blocks=[1,1,1,1]"))],
}  # fmt: skip
SCALE = 2.0


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_latent_is_cached_checked_and_read_back_as_it_is(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    weights = tmp_path / "weights.safetensors"
    overrides = [*NETWORKS[kind], f"autoencoder.scale_factor={SCALE}", "dataset.precompute_latents.min_psnr=0"]
    save_file(make_autoencoder(config_of(tmp_path, *overrides).autoencoder.network).state_dict(), weights)
    dag = make_cache(tmp_path, *overrides, f"autoencoder.weights={weights}", shards=2)
    latents, given = dag.statuses["precompute_latents"].job.output, dag.config.autoencoder

    cached = {key: fields for shard in (0, 1) for key, fields in iterate_tar(latents / f"32/{shard:06d}.tar")}
    assert len(cached) == 12 and all(set(fields) == {"latent.npy", "txt"} for fields in cached.values())
    stored = {key: decode_array(fields["latent.npy"]) for key, fields in cached.items()}
    image = torch.stack([to_tensor(resize_and_crop(picture(1, row), 32)) for row in range(6)])
    with torch.inference_mode():
        expected = load_autoencoder(given, "cpu").encode(image).numpy()  # of VQ: before the codebook
    for row in range(6):
        np.testing.assert_allclose(stored[f"000001{row:02d}"], expected[row], rtol=2e-3, atol=2e-3)
    assert not verify(latents.path, workers=1).findings

    output = StageFolder(tmp_path / "train", "train")
    output.path.mkdir()
    write_selection(output.path / "selection.parquet", {shard: np.ones(6, bool) for shard in (0, 1)})
    inputs = {stage: dag.statuses[stage].job.output for stage in ("filter_metadata", "filter_images")}
    job = replace(dag.statuses["precompute_latents"].job, inputs={**inputs, "precompute_latents": latents},
                  what={"autoencoder": given, "dataset.mixture": {}}, output=output)  # fmt: skip
    data = train.train_data(job, {"": "selection"})
    loader = Loader(data, Draw(SEED, 10, 0.0), None, lanes=2, window_shards=2, batch_size=4, micro_batch_size=4)
    batches, seen = loader.batches(0), {}
    for _ in range(3):
        batch = next(batches)
        seen |= dict(zip(batch.keys, batch.z0, strict=True))
    assert seen.keys() == stored.keys()
    for key, z0 in seen.items():
        assert torch.equal(z0, SCALE * torch.tensor(stored[key]).float())
