"""A cache of latents as `python -m pipelines.inspect` shows it: statistics, and samples decoded beside captions."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import resize_and_crop
from ldm.shards import CorruptSample, ShardReader, decode_array
from pipelines import inspect
from pipelines.checking import latent_sheet
from pipelines.manifest import read_json, write_json
from pipelines.training_set import shard_info
from tests.pipelines.small_cache import latents_of, make_cache, picture


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("cache")
    make_cache(outputs, shards=2)
    return outputs


def test_statistics_are_those_of_the_latents(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([f"path={latents_of(cache).path}"]) == 0
    text = capsys.readouterr().out
    means = []
    for record in latents_of(cache).committed().values():
        reader = ShardReader(shard_info(latents_of(cache), record))
        means += [decode_array(reader.read(i)[1]["moments.npy"])[:4] for i in range(len(reader))]
    z = np.stack(means).astype(np.float64)
    assert "32: 12 samples in 2 shards, 12 of them measured" in text
    said = [float(x) for x in re.search(r"std of z by channel:(.*)all", text)[1].split()]
    np.testing.assert_allclose(said, z.std(axis=(0, 2, 3)), atol=6e-4)
    assert f"all {z.std():.4f}, so that scale_factor {1 / z.std():.4f} makes it 1" in text
    assert "captions: 27 to 27 characters, median 27, 0 empty, 12 different" in text


def test_the_sheet_shows_the_pictures_that_were_encoded(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    lines = latent_sheet.describe(latents_of(tmp_path) / "32/000001.index")
    path = latents_of(tmp_path) / "sheet-000001.png"
    assert lines[-1].endswith(str(path)) and "32: 6 samples in 1 shards" in lines[0]
    sheet = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(float)
    # The first tile stands below the heading, which takes as much as draw_sheet gives it.
    first = sheet[35 : 35 + 32, 10 : 10 + 32]
    others = [np.abs(first - resize_and_crop(picture(1, row), 32)).mean() for row in range(6)]
    assert np.argmin(others) == 0 and others[0] < 20


def test_latents_are_never_decoded_by_another_autoencoder(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    plan = latents_of(tmp_path) / "plan.json"
    value = read_json(plan)
    value["what"]["autoencoder.weights"] = "0123456789abcdef"
    write_json(plan, value)
    (plan.parent / "sheet.png").unlink(missing_ok=True)
    last = latent_sheet.describe(plan.parent)[-1]
    assert "no sheet: the autoencoder's weights, 0123456789ab, are in no place" in last
    assert not list(plan.parent.glob("sheet*"))


def test_damaged_samples_are_refused_and_not_shown(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    with open(latents_of(tmp_path) / "32/000000.tar", "r+b") as file:
        file.seek(700)
        file.write(b"????")
    with pytest.raises(CorruptSample, match="sample 00000000 does not match its crc32"):
        latent_sheet.describe(latents_of(tmp_path).path)


def test_other_folders_are_not_taken_for_a_cache(cache: Path) -> None:
    assert not latent_sheet.is_latents(cache / "small/download")
    assert not latent_sheet.is_latents(cache / "small/download/000000.tar")
    assert not latent_sheet.is_latents(cache)
