"""What is cached is what the autoencoder says of the pictures, to the byte, whoever makes it and however often."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.buckets import bucket_shapes, fit, nearest_shape
from ldm.config import AutoencoderSettings
from ldm.encode import Encoder, TooLarge, to_stored
from ldm.images import decode_rgb, resize_and_crop, to_tensor
from ldm.models.autoencoder import load_autoencoder
from ldm.shards import decode_array, iterate_tar
from ldm.training.loader import Draw, Loader
from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder, StaleError
from pipelines.selection import write_selection
from pipelines.stages import precompute_latents, train
from pipelines.stages.precompute_latents import Worker
from pipelines.training_set import check_cache, check_scale
from pipelines.verify import verify
from tests.ldm.models.test_tiny_autoencoder import TAEF2, _pretrained
from tests.pipelines.small_cache import config_of, make_cache, picture

MORE = ["dataset.precompute_latents.more_resolutions=[48]", "dataset.precompute_latents.flip=true",
        "dataset.precompute_latents.buckets={max_aspect: 2.0, step: 8}",
        "dataset.precompute_latents.min_psnr=0"]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Dag:
    torch.set_num_threads(1)
    return make_cache(tmp_path_factory.mktemp("plain"), shards=3)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Dag:
    """Buckets of two resolutions, mirrored pictures besides."""
    torch.set_num_threads(1)
    return make_cache(tmp_path_factory.mktemp("rich"), *MORE, shards=2)


def job_of(dag: Dag, output: Path, **settings: Any) -> Job:
    """The job again, with another output and some settings changed."""
    job = dag.statuses["precompute_latents"].job
    changed = replace(job.what["dataset.precompute_latents"], **settings)
    folder = StageFolder(output, "precompute_latents")
    return replace(job, what={**job.what, "dataset.precompute_latents": changed}, output=folder)


def files(folder: StageFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes()
            for path in sorted(folder.path.rglob("0*")) if path.is_file()}  # fmt: skip


def samples(folder: StageFolder, tar: str) -> dict[str, dict[str, bytes]]:
    return dict(iterate_tar(folder / tar))


# -- bytes -----------------------------------------------------------------------------------------------------------
def test_a_shard_s_bytes_do_not_depend_on_who_makes_it_or_after_what(plain: Dag, tmp_path: Path) -> None:
    """A worker that was used before, with another thread count and more decoding threads, in another order."""
    first = plain.statuses["precompute_latents"].job.output
    job = job_of(plain, tmp_path)
    resources = replace(job.how.cluster.precompute_latents, num_cpus=3)
    job = replace(job, how=replace(job.how, cluster=replace(job.how.cluster, precompute_latents=resources)))
    worker = Worker(job)
    for shard in (2, 0, 1, 2):
        torch.set_num_threads(2)  # what a reused process may come with
        worker.run_shard(shard)
    made = {name: data for name, data in files(first).items() if name != "plan.json"}
    assert files(job.output) == made and len(made) == 9


def test_moments_are_the_autoencoder_s_and_captions_are_whole(plain: Dag) -> None:
    job = plain.statuses["precompute_latents"].job
    read = samples(job.output, "32/000001.tar")
    assert [fields["txt"] for fields in read.values()] == [f"a picture of waves {key}".encode() for key in read]
    autoencoder = load_autoencoder(precompute_latents.settings_of(job), "cpu")
    image = torch.stack([to_tensor(resize_and_crop(picture(1, row), 32)) for row in range(6)])
    with torch.inference_mode():
        expected = autoencoder.encode(image).numpy()
    stored = np.stack([decode_array(fields["moments.npy"]) for fields in read.values()])
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)
    facts = job.output.record(1).facts
    assert facts["std"] == pytest.approx(stored[:, :4].astype(float).std(), abs=1e-5) and facts["psnr"] > 15


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.1), ("fp16", 0.02)])
def test_other_precisions_give_nearly_the_same(plain: Dag, tmp_path: Path, precision: str, tolerance: float) -> None:
    job = job_of(plain, tmp_path, precision=precision)
    Worker(job).run_shard(0)
    ours, theirs = (np.stack([decode_array(f["moments.npy"]) for f in samples(folder, "32/000000.tar").values()])
                    for folder in (job.output, plain.statuses["precompute_latents"].job.output))  # fmt: skip
    assert 0 < np.abs(ours.astype(float) - theirs)[:, :4].max() < tolerance * np.abs(theirs.astype(float)).max()


def test_an_unknown_precision_is_refused(plain: Dag, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'int8'; there are: float32, bf16, fp16"):
        Worker(job_of(plain, tmp_path, precision="int8"))


# -- resolutions, buckets, mirrors -----------------------------------------------------------------------------------
def test_shapes_have_the_square_s_area_and_the_nearest_is_taken() -> None:
    shapes = bucket_shapes(256, 2.0, 64)
    assert shapes == [(192, 320), (192, 384), (256, 256), (320, 192), (384, 192)]
    assert all(0.75 < h * w / 512**2 < 1.25 for h, w in bucket_shapes(512, 3.0, 64))
    assert nearest_shape(shapes, 1080, 1920) == (192, 320) and nearest_shape(shapes, 3000, 1000) == (384, 192)
    assert nearest_shape(shapes, 500, 490) == (256, 256)
    with pytest.raises(ValueError, match="the step must divide it"):
        bucket_shapes(250, 2.0, 64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("size", [(40, 40), (13, 90), (90, 13), (24, 40)])
def test_a_picture_fills_its_shape_and_keeps_its_middle(shape: tuple[int, int], size: tuple[int, int]) -> None:
    rgb = np.zeros((*size, 3), np.uint8)
    rgb[size[0] // 2, size[1] // 2] = 255
    fitted = fit(rgb, shape)
    assert fitted.shape == (*shape, 3)
    y, x = np.unravel_index(fitted[..., 0].argmax(), shape)
    assert abs(y - shape[0] / 2) <= 4 and abs(x - shape[1] / 2) <= 4


def test_resolutions_and_shapes_come_from_one_decode(
    rich: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(data: bytes) -> np.ndarray:
        decoded.append(len(data))
        return decode_rgb(data)

    monkeypatch.setattr(precompute_latents, "decode_rgb", counted)
    job = job_of(rich, tmp_path)
    record = Worker(job).run_shard(0)
    assert len(decoded) == record.samples == record.rows == 6
    folders = record.facts["folders"]
    assert sum(n for folder, n in folders.items() if folder.startswith("32/")) == 6
    assert sum(n for folder, n in folders.items() if folder.startswith("48/")) == 6 and len(folders) > 5
    assert all(name.partition("/")[0] in ("32", "48") for name in record.files)
    for row in range(6):
        height, width = picture(0, row).shape[:2]
        h, w = nearest_shape(bucket_shapes(48, 2.0, 8), height, width)
        fields = samples(job.output, f"48/{h}x{w}/000000.tar")[f"000000{row:02d}"]
        assert decode_array(fields["moments.npy"]).shape == (8, h // 8, w // 8)
    assert not verify(rich.statuses["precompute_latents"].job.output.path, workers=1).findings


def test_mirrored_latents_are_not_the_latents_of_mirrored_pixels(rich: Dag) -> None:
    """Why flipped pictures are encoded again: the encoder does not commute with mirrors, not even on smooth waves."""
    job = rich.statuses["precompute_latents"].job
    autoencoder = load_autoencoder(precompute_latents.settings_of(job), "cpu")
    right, wrong, differences = [], [], []
    for shape in bucket_shapes(48, 2.0, 8):
        tar = job.output / f"48/{shape[0]}x{shape[1]}/000000.tar"
        for key, fields in iterate_tar(tar) if tar.exists() else ():
            mirrored = to_tensor(fit(picture(0, int(key[6:])), shape)).flip(-1)
            pixels = decode_array(fields["flipped.npy"])[:4].astype(np.float32)
            latent = decode_array(fields["moments.npy"])[:4, :, ::-1].astype(np.float32)
            for z, found in ((pixels, right), (np.ascontiguousarray(latent), wrong)):
                with torch.inference_mode():
                    image = autoencoder.decode(torch.from_numpy(z)[None])[0].clamp(-1, 1)
                found.append(10 * math.log10(4 / float((image - mirrored).square().mean())))
            differences.append(np.abs(pixels - latent).mean() / pixels.std())
    assert len(right) == 6 and np.mean(right) > np.mean(wrong) + 0.5, (right, wrong)
    assert np.mean(differences) > 0.1, differences


# -- guards ----------------------------------------------------------------------------------------------------------
def spoilt(worker: Worker, change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = worker.encoder.autoencoder.encode
    monkeypatch.setattr(worker.encoder.autoencoder, "encode", lambda image: change(original(image)))


def put(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(moments: torch.Tensor) -> torch.Tensor:
        moments = moments.clone()
        moments[1, 0, 0, 0] = number
        return moments

    return change


@pytest.mark.parametrize("number, words", [(70_000.0, "a number of size 7e[+]04"), (float("nan"), "not finite"),
                                           (float("inf"), "not finite")])  # fmt: skip
def test_what_fp16_cannot_hold_stops_the_stage_and_is_named(
    plain: Dag, tmp_path: Path, number: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(job_of(plain, tmp_path))
    spoilt(worker, put(number), monkeypatch)
    with pytest.raises(ValueError, match=f"sample 00000001: its latent has .*{words}.*expected at most 65504"):
        worker.run_shard(0)
    assert worker.job.output.record(0) is None and not list(tmp_path.rglob("*.tar"))
    assert to_stored(["a"], torch.full((1, 1), 65504.0)).isfinite().all()  # the largest that it does hold


def test_out_of_memory_stops_at_once_with_a_batch_size_that_fits(
    plain: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Encoder._forward

    def small_device(self: Encoder, image: torch.Tensor) -> torch.Tensor:
        if len(image) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, image)

    monkeypatch.setattr(Encoder, "_forward", small_device)
    worker, started = Worker(job_of(plain, tmp_path, batch_size=16)), time.monotonic()
    message = (
        "16 pictures of 32x32 in float32 do not fit into the memory of cpu; dataset.precompute_latents.batch_size=4 "
        "fits; python -m pipelines.plan [+]stage=precompute_latents"
    )
    with pytest.raises(TooLarge, match=message):
        worker.run_shard(0)
    monkeypatch.setattr(worker, "_encode", None)
    with pytest.raises(TooLarge, match=message):  # nothing is tried again
        worker.run_shard(1)
    assert time.monotonic() - started < 10
    assert Worker(job_of(plain, tmp_path, batch_size=4)).run_shard(0).samples == 6


def test_decoding_back_that_does_not_fit_names_its_own_setting(
    plain: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_device(z: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    worker = Worker(job_of(plain, tmp_path))
    monkeypatch.setattr(worker.encoder.autoencoder, "decode", small_device)
    with pytest.raises(TooLarge, match=r"2 pictures of .*decoded back at once.*set .*check_samples to less than 2"):
        worker.run_shard(0)


def test_decoded_pictures_that_do_not_fit_stop_the_run_too(
    plain: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's error, from a decoding thread."""
    with pytest.raises(MemoryError) as error:
        np.empty(1 << 60, np.uint8)

    def no_room(data: bytes) -> np.ndarray:
        raise error.value

    monkeypatch.setattr(precompute_latents, "decode_rgb", no_room)
    worker = Worker(job_of(plain, tmp_path))
    for shard in (0, 1):
        with pytest.raises(TooLarge, match="set dataset.precompute_latents.batch_size to less than 4") as refused:
            worker.run_shard(shard)
        assert refused.value.stops_the_run and not list(tmp_path.rglob("*.tar"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    plain: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Encoder, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cuDNN error")

    monkeypatch.setattr(Encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="cuDNN error"):
        Worker(job_of(plain, tmp_path)).run_shard(0)


def test_a_wrong_normalisation_falls_under_the_floor(
    plain: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in [0, 1] where [-1, 1] is meant, a mistake that others shipped."""
    good = plain.statuses["precompute_latents"].job.output.record(0).facts["psnr"]
    worker = Worker(job_of(plain, tmp_path, min_psnr=good - 3))
    original = worker.encoder.autoencoder.encode
    monkeypatch.setattr(worker.encoder.autoencoder, "encode", lambda image: original((image + 1) / 2))
    with pytest.raises(ValueError, match=r"in 32 reach \d+.\d dB, expected at least .*min_psnr.*is wrong"):
        worker.run_shard(0)
    assert Worker(job_of(plain, tmp_path / "b", min_psnr=good - 3)).run_shard(0).samples == 6  # the twin


# -- what training asks of a cache -----------------------------------------------------------------------------------
def train_job(dag: Dag, *overrides: str) -> Job:
    other = Dag(config_of(dag.run_folder.parent, *overrides))
    job = dag.statuses["precompute_latents"].job
    return replace(job, what={"autoencoder": other.config.autoencoder, "dataset.mixture": {}})


def test_a_cache_of_another_autoencoder_scale_or_size_is_refused_with_both_named(plain: Dag, tmp_path: Path) -> None:
    latents = plain.statuses["precompute_latents"].job.output
    records = latents.committed()
    check_cache(latents, records, train_job(plain))
    other = tmp_path / "other.safetensors"
    shutil.copy(precompute_latents.settings_of(plain.statuses["precompute_latents"].job).weights, other)
    other.write_bytes(other.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"was made with weights \w{12}; autoencoder.weights=.* has \w{12}; name"):
        check_cache(latents, records, train_job(plain, f"autoencoder.weights={other}"))
    with pytest.raises(ValueError, match=r"'decoder_blocks': \[2\].* asked for is .*'decoder_blocks': \[3\]"):
        check_cache(latents, records, train_job(plain, "autoencoder.network.tiny.decoder_blocks=[3]"))
    sizes = {0: records[0], 1: replace(records[1], facts={**records[1].facts, "latent_side": 8})}
    with pytest.raises(ValueError, match=r"has latents with sides \[4, 8\], expected one"):
        check_cache(latents, sizes, train_job(plain))
    with pytest.raises(ValueError, match=r"autoencoder.scale_factor=0.1 makes it 0.0\d+, expected 0.4 to 2.5; about"):
        check_scale(latents, records, 0.1)


def test_a_cache_that_was_made_for_another_scale_factor_is_refused_exactly(plain: Dag, tmp_path: Path) -> None:
    """0.13025 for 0.18215 leaves a standard deviation of 0.7, as drawings have: only the plan tells them apart."""
    made = plain.statuses["precompute_latents"].job.output
    assert made.read_plan()["noted"] == {"autoencoder.scale_factor": plain.config.autoencoder.scale_factor}
    facts = {**made.record(0).facts, "std": 1 / 0.18215, "mean": 0.0}
    records, latents = {0: replace(made.record(0), facts=facts)}, StageFolder(tmp_path, "precompute_latents")
    right, wrong = (train_job(plain, f"autoencoder.scale_factor={factor}") for factor in (0.18215, 0.13025))
    latents.write_plan({**made.read_plan(), "noted": {"autoencoder.scale_factor": 0.18215}})
    check_cache(latents, records, right)
    with pytest.raises(ValueError, match=r"made for autoencoder.scale_factor=0.18215; asked for is 0.13025.*plan.json"):
        check_cache(latents, records, wrong)
    latents.write_plan({name: value for name, value in made.read_plan().items() if name != "noted"})
    check_cache(latents, records, wrong)  # of an older plan only the rough check is left
    with pytest.raises(ValueError, match=r"scale_factor=1.5153 makes it 8.3\d+, expected"):
        check_cache(latents, records, train_job(plain))


def test_the_pipeline_refuses_it_too_before_any_stage_starts(plain: Dag) -> None:
    changed = Dag(config_of(plain.run_folder.parent, "autoencoder.network.tiny.decoder_blocks=[3]"))
    with pytest.raises(StaleError, match=r"decoder_blocks: \[2\] there, \[3\] now"):
        changed.refresh("train")


# -- real photographs ------------------------------------------------------------------------------------------------
def test_real_photographs_through_taef2(tmp_path: Path) -> None:
    """TAEF2 (32 channels, deterministic) on photographs of CC12M; LDM_EXTRA_DATA names the folder with both."""
    folder = Path(os.environ.get("LDM_EXTRA_DATA", "/nonexistent"))
    if not (folder / "cc12m_32.tar").exists():
        pytest.skip("LDM_EXTRA_DATA is not set: it names a folder with taef2_*.pth and cc12m_32.tar")
    path = tmp_path / "taef2.safetensors"
    save_file(_pretrained(folder).state_dict(), path)
    settings = AutoencoderSettings(TAEF2, str(path), 1.0)
    encoder = Encoder(settings, torch.device("cpu"), batch_size=2, precision="float32", threads=1, channels_last=True)
    psnrs: list[float] = []
    with tarfile.open(folder / "cc12m_32.tar") as tar:
        photographs = [member for member in tar if member.name.endswith(".jpg")][:4]
        for member in photographs:
            image = to_tensor(fit(decode_rgb(tar.extractfile(member).read()), (128, 128)))[None]
            psnrs += encoder.psnr(image, to_stored([member.name], encoder.encode(image)))
    assert len(psnrs) == 4 and min(psnrs) > 20, psnrs


def test_training_reads_a_cache_of_shapes_sample_by_sample(rich: Dag, tmp_path: Path) -> None:
    """Every kept sample once in an epoch, each in its own shape, and only of the resolution that is trained on."""
    job = rich.statuses["precompute_latents"].job
    latents = job.output
    output, masks = StageFolder(tmp_path, "train"), {0: np.arange(6) != 2, 1: np.ones(6, bool)}
    write_selection(tmp_path / "selection.parquet", masks)
    folders = {stage: rich.statuses[stage].job.output for stage in ("filter_metadata", "filter_images")}
    used = replace(train_job(rich), inputs={**folders, "precompute_latents": latents}, output=output)
    data = train.train_data(used, {"": "selection"})
    assert sum(data.counts()) == 11 and all("/32/" in info.tar for info in data.shards)
    loader = Loader(data, Draw(0, 10, 0.0), None, lanes=2, window_shards=2, batch_size=1, micro_batch_size=1)
    seen = {loader.batch(range(i, i + 1)).keys[0]: tuple(loader.batch(range(i, i + 1)).z0.shape[2:]) for i in range(11)}
    assert "00000002" not in seen and len(seen) == 11
    for key, shape in seen.items():
        height, width = picture(int(key[:6]), int(key[6:])).shape[:2]
        expected = nearest_shape(bucket_shapes(32, 2.0, 8), height, width)
        assert shape == (expected[0] // 8, expected[1] // 8), key
