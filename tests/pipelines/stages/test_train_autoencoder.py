"""The stage that trains an autoencoder, on two shards of downloaded pictures: what it reads, commits and leaves."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.models.autoencoder import load_autoencoder
from ldm.shards import ShardWriter
from ldm.training.train_autoencoder import is_held_out, reconstruction_psnr, to_tensor
from pipelines.config import compose
from pipelines.dag import Job, weights_path
from pipelines.embedded_web.drawings import drawings, render_on
from pipelines.journal import read_metrics
from pipelines.manifest import StageFolder, sum_funnel
from pipelines.stages import train_autoencoder
from tests.ldm.training.test_train_autoencoder import NETWORK, TRAINING, captions, pictures
from tests.pipelines.stages.small_run import make_job

FORMATS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
REFUSED = 7  # number of the picture that filter_images does not keep


def encode(image: np.ndarray, number: int) -> dict[str, bytes]:
    ending, form = FORMATS[number % 3]
    buffer = io.BytesIO()
    Image.fromarray(np.kron(image, np.ones((2, 2, 1), np.uint8))).save(buffer, form)
    return {ending: buffer.getvalue(), "txt": captions(40)[number].encode()}


def make_inputs(run: Path) -> dict[str, StageFolder]:
    """Forty pictures of 64 pixels in two shards, and the verdicts on them."""
    download, verdicts = StageFolder(run / "download", "download"), StageFolder(run / "filter_images", "filter_images")
    for shard, rows in enumerate((range(20), range(20, 40))):
        name = f"{shard:06d}"
        with download.attempt(shard, "f") as attempt:
            writer = ShardWriter(attempt.path / f"{name}.tar", attempt.path / f"{name}.index")
            for row in rows:
                writer.write(f"{row:08d}", encode(pictures(40)[row], row))
            writer.close()
            attempt.commit(rows=20, samples=20, dropped={}, inputs={})
        table = [{"key": f"{row:08d}", "verdict": "too_small" if row == REFUSED else ""} for row in rows]
        dropped = {"too_small": 1} if REFUSED in rows else {}
        with verdicts.attempt(shard, "f") as attempt:
            pq.write_table(pa.Table.from_pylist(table), attempt.path / f"{name}.parquet")
            attempt.commit(rows=20, samples=20 - len(dropped), dropped=dropped, inputs={})
    for folder in (download, verdicts):
        records = list(folder.committed().values())
        folder.close("f", records, sum_funnel(records))
    return {"download": download, "filter_images": verdicts}


def job_of(run: Path, inputs: dict[str, StageFolder], max_steps: int = 4) -> Job:
    training = dataclasses.replace(TRAINING, max_steps=max_steps, checkpoint_every_steps=2, log_every_steps=2)
    what = {"autoencoder.network": NETWORK, "autoencoder_training": training}
    return make_job(run, "train_autoencoder", what, inputs)


def test_it_reads_what_was_kept_in_key_order(tmp_path: Path) -> None:
    images, words = train_autoencoder.read_pictures(job_of(tmp_path, make_inputs(tmp_path)), 32)
    kept = [row for row in range(40) if row != REFUSED]
    assert words == [captions(40)[row] for row in kept]
    lossless = [i for i, row in enumerate(kept) if row % 3 == 1]
    np.testing.assert_allclose(images[lossless].astype(int), pictures(40)[[kept[i] for i in lossless]], atol=40)
    assert images.shape == (39, 32, 32, 3) and images.dtype == np.uint8


def test_it_commits_weights_and_figures_and_leaves_no_state(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    job = job_of(tmp_path, inputs)
    record = train_autoencoder.run(job)
    assert record == job.output.record() and job.output.missing_files([record]) == {}
    assert (record.rows, set(record.dropped)) == (39, {"held_out", "like_held_out"})
    assert record.inputs == {name: folder.manifest()["digest"] for name, folder in inputs.items()}
    assert record.facts["scale_factor"] == pytest.approx(1 / record.facts["latent_std"], rel=1e-4)
    files = sorted(path.name for path in job.output.path.iterdir() if not path.name.startswith("."))
    assert files == ["autoencoder.safetensors", "record.json"]
    assert [step for step, _, _ in read_metrics(tmp_path, "train_autoencoder")["loss"]] == [2, 4]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(tmp_path)
    whole = train_autoencoder.run(job_of(tmp_path / "whole", inputs))
    job = job_of(tmp_path / "killed", inputs)
    steps: list[int] = []

    class Killed(BaseException):
        """What ends the process at once, as far as the stage can tell."""

    def log(self: object, values: dict[str, float], step: int) -> None:
        if "held_out_psnr" in values:
            steps.append(step)
            if steps == [2]:
                raise Killed

    monkeypatch.setattr("pipelines.stages.train_autoencoder.Journal.metrics", log)
    with pytest.raises(Killed):
        train_autoencoder.run(job)
    assert job.output.record() is None and (job.output / "state" / "state.safetensors").is_file()
    assert train_autoencoder.run(job).digest == whole.digest
    assert steps == [2, 4], "the first two steps were not taken again"
    weights = load_file(job.output / "autoencoder.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_shipped_weights_do_what_their_card_says() -> None:
    """Every fourth of the 170 held-out drawings; their mean is within half a dB of the mean over all, 26.1 dB."""
    config = compose([])
    settings = dataclasses.replace(config.autoencoder, weights=str(weights_path(config.autoencoder.weights)))
    assert Path(settings.weights).stat().st_size <= 10_000_000
    held_out = [drawing for drawing in drawings() if is_held_out(drawing.caption, config.autoencoder_training)]
    images = np.stack([render_on(drawing, 128) for drawing in held_out[::4]])
    autoencoder = load_autoencoder(settings, "cpu")
    assert len(held_out) == 170
    assert reconstruction_psnr(autoencoder, images).mean() >= 25
    with torch.no_grad():
        z0 = autoencoder.encode(to_tensor(images))[:, : autoencoder.latent_channels] * settings.scale_factor
    assert z0.std() == pytest.approx(1, abs=0.1)
