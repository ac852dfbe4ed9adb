"""Captions as a frozen text encoder sees them, cached beside the latents: what is written, checked and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.models.clip import ClipTextEncoder
from ldm.models.tokenizer import make_tokenizer
from ldm.shards import decode_array, iterate_tar
from ldm.training.loader import Draw, Loader
from pipelines.checking.checks import latents
from pipelines.config import ConfigError, section
from pipelines.dag import Dag, Job, decides
from pipelines.manifest import StageFolder
from pipelines.selection import write_selection
from pipelines.stages import train
from pipelines.training_set import cached_context, caches_of, check_caches, closed_records
from pipelines.verify import verify
from tests.pipelines.small_cache import config_of, make_cache

TOWER = ["text_encoder=clip_vit_l_14", "text_encoder.length=12", "text_encoder.width=8",
         "text_encoder.towers.l.width=8",
         "text_encoder.towers.l.layers=2", "text_encoder.towers.l.heads=2"]  # fmt: skip
READS = ("filter_metadata", "filter_images", "precompute_latents")
CACHED = "dataset.precompute_latents.text_features=true"


def tower(folder: Path, seed: int) -> str:
    """The setting that names a file with a tower of random numbers."""
    torch.manual_seed(seed)
    path = folder / f"tower-{seed}.safetensors"
    save_file(ClipTextEncoder(config_of(folder, *TOWER).text_encoder).state_dict(), path)
    return f"text_encoder.weights={path}"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dag, list[str]]:
    """A run with contexts in its latents, and its settings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("features")
    overrides = [*TOWER, tower(folder, 1), CACHED, "dataset.precompute_latents.flip=true"]
    return make_cache(folder, *overrides, shards=2), overrides


def train_job(dag: Dag, overrides: list[str], output: Path) -> Job:
    """The job of train under these settings over latents that are made; its plan is written."""
    other = Dag(config_of(dag.run_folder.parent, *overrides))
    inputs = {stage: dag.statuses[stage].job.output for stage in READS}
    what = {path: section(other.config, path) for path in decides(other.config, "train")}
    job = replace(dag.statuses["precompute_latents"].job, what=what, output=StageFolder(output, "train"), inputs=inputs)
    job.output.write_plan(other.plan("train"))
    return job


def test_a_sample_holds_the_context_of_its_whole_caption(cached: tuple[Dag, list[str]]) -> None:
    dag, _ = cached
    job = dag.statuses["precompute_latents"].job
    config = job.what["text_encoder"]
    torch.manual_seed(1)
    text_encoder, tokenizer = ClipTextEncoder(config).eval(), make_tokenizer(config)
    for key, fields in iterate_tar(job.output / "32/000001.tar"):
        assert fields.keys() == {"moments.npy", "flipped.npy", "context.npy", "txt"}
        with torch.inference_mode():
            expected = text_encoder(tokenizer([fields["txt"].decode()]))[0].numpy()
        context = decode_array(fields["context.npy"])
        assert context.shape == (12, 8) and context.dtype == np.float16, key
        np.testing.assert_allclose(context, expected, atol=3e-3)
    assert verify(job.output.path, 1).findings == []


def test_training_reads_them_and_nothing_else_of_the_caption(cached: tuple[Dag, list[str]], tmp_path: Path) -> None:
    dag, overrides = cached
    job = train_job(dag, overrides, tmp_path)
    caches = caches_of(job)
    check_caches(caches, {"": closed_records(caches[0].latents)}, job)
    write_selection(tmp_path / "selection.parquet", {0: np.ones(6, bool), 1: np.ones(6, bool)})
    data = train.train_data(job, {"": "selection"})
    assert data.context_shape == [12, 8]
    null = np.zeros((12, 8), np.float16)
    loader = Loader(data, Draw(0, 10, 0.5), None, lanes=2, window_shards=1, batch_size=12, micro_batch_size=12,
                    null_context=null)  # fmt: skip
    batch = loader.batch(range(12))
    rows = {key: decode_array(fields["context.npy"]) for shard in range(2)
            for key, fields in iterate_tar(dag.statuses["precompute_latents"].job.output / f"32/{shard:06d}.tar")}
    kept = [i for i in range(12) if batch.condition["context"][i].any()]
    assert 0 < len(kept) < 12
    for i in kept:
        np.testing.assert_array_equal(batch.condition["context"][i], rows[batch.keys[i]])


def test_another_text_encoder_is_refused_and_a_trained_one_reads_captions(
    cached: tuple[Dag, list[str]], tmp_path: Path
) -> None:
    dag, overrides = cached
    folder = dag.statuses["precompute_latents"].job.output
    other = train_job(dag, [*overrides, tower(tmp_path, 2)], tmp_path / "other")
    with pytest.raises(ValueError, match=r"encoded by a text encoder with weights \w{64}; asked for is weights \w{64}"):
        cached_context(folder, other)
    assert cached_context(folder, train_job(dag, ["text_encoder=words_tiny"], tmp_path / "trained")) is None


@pytest.mark.parametrize("given, found", [
    (["text_encoder=words_tiny"], "of kind 'transformer'"), ([*TOWER], "with weights None"),
])  # fmt: skip
def test_only_what_never_changes_is_cached(tmp_path: Path, given: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=f"text_features is true and text_encoder .*{found}.*set text_features=false"):
        Dag(config_of(tmp_path, CACHED, *given))


def test_a_context_that_is_missing_or_of_another_shape_is_found(
    cached: tuple[Dag, list[str]], tmp_path: Path
) -> None:
    dag, _ = cached
    job = dag.statuses["precompute_latents"].job
    plan = job.output.read_plan()
    longer = {**plan, "what": {**plan["what"], "text_encoder": {**plan["what"]["text_encoder"], "length": 13}}}
    files, record = job.output.path, job.output.record(0)
    assert list(latents(files, record, plan)) == []
    found = list(latents(files, record, longer))
    assert len(found) == 6 and found[0][2:] == ("context.npy of shape (12, 8), float16", "(13, 8), float16")
    del longer["what"]["text_encoder"]
    assert {problem[3] for problem in latents(files, record, longer)} == {"txt, flipped.npy, moments.npy"}


def test_caches_that_are_mixed_must_agree(cached: tuple[Dag, list[str]], tmp_path: Path) -> None:
    dag, overrides = cached
    plain = make_cache(tmp_path, shards=2).statuses["precompute_latents"].job.output
    job = train_job(dag, overrides, tmp_path / "train")
    caches = [*caches_of(job), replace(caches_of(job)[0], name="@plain", latents=plain)]
    records = {cache.name: closed_records(cache.latents) for cache in caches}
    with pytest.raises(ValueError, match="must all hold their captions' contexts, or none of them: .*yes.*no"):
        check_caches(caches, records, job)
