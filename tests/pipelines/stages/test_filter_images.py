"""Every picture is looked at once: sizes, hashes, scores and a verdict go beside the shard; no pixels are written."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.config import ClipConfig
from ldm.images import encode_png
from ldm.models.clip import Clip
from ldm.models.score_head import ScoreHead
from pipelines import cluster
from pipelines.config import ConfigError, compose
from pipelines.dag import Dag, Job
from pipelines.devices import device_of
from pipelines.manifest import StageFolder
from pipelines.run import check_scores
from pipelines.settings import ClipScoreConfig, FilterImagesConfig, ScoreHeadConfig
from pipelines.stages import download, filter_images

PLAIN = FilterImagesConfig(min_size=40, max_aspect=3.0, clip=None, heads={})
SIZES = [(64, 64), (48, 100), (20, 64), (40, 140), (80, 50), (64, 65), (50, 41)]  # h, w; the third is small, then long


def picture(i: int) -> np.ndarray:
    height, width = SIZES[i]
    y, x = np.mgrid[0:height, 0:width] / 12.0
    return np.uint8(127.5 + 60 * np.stack([np.sin(x * (i + 1) + c) + np.cos(y * (3 - c)) for c in range(3)], -1))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A download of eight pictures, the last of which is none, with its ledger."""
    folder = StageFolder(tmp_path / "download", "download")
    with folder.attempt(0, "f") as attempt:
        ledger = []
        with tarfile.open(attempt.path / "000000.tar", "w") as tar:
            for i in range(len(SIZES) + 1):
                data = encode_png(picture(i)) if i < len(SIZES) else b"no picture"
                for suffix, content in (("png", data), ("json", b"{}"), ("txt", f"waves number {i}".encode())):
                    member = tarfile.TarInfo(f"0000000{i}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                ledger.append({"key": f"0000000{i}", "url": "u", "status": "success", "reason": "", "width": 1,
                               "height": 1, "original_width": 1000 + i, "original_height": 2000, "md5": f"m{i}",
                               "sha256": f"s{i}"})  # fmt: skip
        pq.write_table(pa.Table.from_pylist(ledger, schema=download.SCHEMA), attempt.path / "000000.parquet")
        attempt.commit(rows=len(ledger), samples=len(ledger), dropped={}, inputs={})
    dag = Dag(compose([f"paths.outputs={tmp_path / 'none'}"]))
    for stage in ("filter_metadata", "download"):
        dag.refresh(stage)
    return replace(dag.job("filter_images"), inputs={"download": folder}, what={"dataset.filter_images": PLAIN},
                   output=StageFolder(tmp_path / "filter_images", "filter_images"))  # fmt: skip


def with_settings(job: Job, settings: FilterImagesConfig, name: str = "scored") -> Job:
    output = StageFolder(job.output.path.parent / name, "filter_images")
    return replace(job, what={"dataset.filter_images": settings}, output=output)


def rows_of(job: Job) -> list[dict[str, Any]]:
    return pq.read_table(job.output / "000000.parquet").to_pylist()


def test_every_picture_has_a_row_in_key_order_with_sizes_hashes_and_one_verdict(job: Job) -> None:
    record = filter_images.run_shard(job, 0)
    rows = rows_of(job)
    assert [row["verdict"] for row in rows] == ["", "", "too_small", "extreme_shape", "", "", "",
                                                "undecodable_not_an_image"]  # fmt: skip
    assert (record.rows, record.samples) == (8, 5)
    assert record.dropped == {"extreme_shape": 1, "too_small": 1, "undecodable_not_an_image": 1}
    assert [row["key"] for row in rows] == [f"0000000{i}" for i in range(8)]
    assert [(row["height"], row["width"]) for row in rows] == [*SIZES, (0, 0)]
    assert [(row["original_width"], row["md5_of_source"], row["sha256_of_source"]) for row in rows] == [
        (1000 + i, f"m{i}", f"s{i}") for i in range(8)
    ]
    assert rows[0]["sha256"] == hashlib.sha256(encode_png(picture(0))).hexdigest()
    assert len({row["phash"] for row in rows if not row["verdict"]}) == 5
    assert set(record.files) == {"000000.parquet"}, "no pixels are written"


def test_without_scores_a_worker_loads_no_torch(job: Job) -> None:
    import subprocess
    import sys

    code = "import sys, pipelines.stages.filter_images; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- scores -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipScoreConfig:
    """A tiny CLIP with fixed random weights."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = folder / "tiny-for-scores.json"
    model.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    torch.manual_seed(3)
    weights = folder / "clip.safetensors"
    save_file(Clip(ClipConfig(str(model), None)).model.state_dict(), weights)
    return ClipScoreConfig(str(model), str(weights), digest(weights), batch_size=4, keep_embeddings=True)


def head(folder: Path, widths: list[int], activation: str, output: str) -> ScoreHeadConfig:
    torch.manual_seed(sum(widths))
    state: dict[str, torch.Tensor] = {}
    for i, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        state |= {f"layers.{i}.weight": torch.randn(out, into), f"layers.{i}.bias": torch.randn(out)}
    path = folder / f"{activation}-{output}.safetensors"
    save_file(state, path)
    return ScoreHeadConfig(str(path), digest(path), activation, output)


def test_scores_are_those_of_the_networks_and_go_beside_the_shard(
    job: Job, clip: ClipScoreConfig, tmp_path: Path
) -> None:
    heads = {"aesthetic": head(tmp_path, [16, 8, 1], "none", "none"),
             "nsfw": head(tmp_path, [16, 4, 1], "relu", "sigmoid")}  # fmt: skip
    scored = with_settings(job, replace(PLAIN, clip=clip, heads=heads))
    record = filter_images.run_shard(scored, 0)
    rows = rows_of(scored)
    network = Clip(ClipConfig(clip.model, clip.weights))
    for i, row in enumerate(rows):
        if row["verdict"]:
            assert row["clip_similarity"] is row["aesthetic"] is row["nsfw"] is row["embedding"] is None
            continue
        image = network.encode_image(network.preprocess(Image.fromarray(picture(i)))[None])[0]
        text = network.encode_text(network.tokenize([f"waves number {i}"]))[0]
        a, b = load_file(heads["aesthetic"].weights), load_file(heads["nsfw"].weights)
        plain = a["layers.1.weight"] @ (a["layers.0.weight"] @ image + a["layers.0.bias"]) + a["layers.1.bias"]
        unsafe = b["layers.1.weight"] @ (b["layers.0.weight"] @ image + b["layers.0.bias"]).relu() + b["layers.1.bias"]
        assert row["clip_similarity"] == pytest.approx(float(image @ text), abs=1e-5)
        assert row["aesthetic"] == pytest.approx(plain.item(), abs=1e-4)
        assert row["nsfw"] == pytest.approx(torch.sigmoid(unsafe).item(), abs=1e-5)
        np.testing.assert_allclose(np.array(row["embedding"], np.float32), image, atol=1e-3)
    again = with_settings(job, replace(PLAIN, clip=clip, heads=heads), "again")
    assert filter_images.run_shard(again, 0).files == record.files, "the same bytes again"
    verdicts = [row["verdict"] for row in rows]
    filter_images.run_shard(job, 0)
    assert verdicts == [row["verdict"] for row in rows_of(job)], "scores drop nothing"


def test_a_score_does_not_depend_on_who_is_in_its_batch(job: Job, clip: ClipScoreConfig) -> None:
    found = []
    for size in (1, 4):
        other = replace(clip, batch_size=size, keep_embeddings=False)
        scored = with_settings(job, replace(PLAIN, clip=other), str(size))
        filter_images.run_shard(scored, 0)
        found.append([row["clip_similarity"] or 0.0 for row in rows_of(scored)])
        assert "embedding" not in rows_of(scored)[0]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_weights_that_are_absent_or_others_say_what_to_put_where(
    job: Job, clip: ClipScoreConfig, tmp_path: Path
) -> None:
    wrong = with_settings(job, replace(PLAIN, clip=replace(clip, sha256="0" * 64)))
    with pytest.raises(ValueError, match=r"sha256 .*, expected 0{64} \(dataset.filter_images.clip.sha256\)"):
        filter_images.Worker(wrong)
    values = "{model: ViT-L-14, weights: nowhere.safetensors, sha256: abc, batch_size: 4, keep_embeddings: false}"
    with pytest.raises(ConfigError, match="filter_images.clip.weights: no file at .*nowhere.* put the file there"):
        Dag(compose([f"dataset.filter_images.clip={values}"]))
    narrow = {"aesthetic": head(tmp_path, [24, 1], "none", "none")}
    with pytest.raises(ValueError, match="heads.aesthetic reads 24 numbers, but .* gives 16"):
        filter_images.run_shard(with_settings(job, replace(PLAIN, clip=clip, heads=narrow)), 0)
    with pytest.raises(ValueError, match="filter_images.clip is null, but .* read its embeddings"):
        filter_images.Worker(with_settings(job, replace(PLAIN, heads=narrow)))


def test_a_score_head_reads_what_was_released_under_its_own_names() -> None:
    torch.manual_seed(0)
    widths = [6, 5, 4, 1]
    layers = [(torch.randn(out, into), torch.randn(out)) for into, out in zip(widths, widths[1:], strict=False)]
    x, mean, variance = torch.randn(7, 6), torch.randn(6), torch.rand(6) + 0.1

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        for i, (weight, bias) in enumerate(layers):
            x = (x.relu() if i else x) @ weight.T + bias
        return x[:, 0]

    def named(names: list[str]) -> dict[str, torch.Tensor]:
        return {f"{name}{part}": value for name, layer in zip(names, layers, strict=True)
                for part, value in zip(("weight", "bias"), layer, strict=True)}  # fmt: skip

    sequential = named(["layers.0.", "layers.2.", "layers.10."])  # as LAION's aesthetic predictor, with gaps
    detector = named(["linear_1.", "linear_2.", "linear_3."]) | {"norm.mean": mean, "norm.variance": variance}
    torch.testing.assert_close(ScoreHead(sequential, "relu", "none", "x")(x), by_hand(x))
    safe = ScoreHead(detector, "relu", "sigmoid", "x")(x)
    torch.testing.assert_close(safe, torch.sigmoid(by_hand((x - mean) / variance.sqrt())))
    weight, bias = torch.randn(1, 6), torch.randn(1)
    one = ScoreHead({"weight": weight, "bias": bias}, "none", "none", "x")
    torch.testing.assert_close(one(x), (x @ weight.T + bias)[:, 0])
    assert one.width == 6
    with pytest.raises(ValueError, match="activation=gelu, output=none; expected none or relu"):
        ScoreHead(sequential, "gelu", "none", "x")
    wrong = [{"fc.weight": weight}, {"weight": weight}, {"layers.0.weight": weight, "layers.0.bias": bias, "x": bias},
             {**sequential, "layers.10.weight": torch.randn(1, 5)}, {**detector, "norm.more": mean},
             {name: x for name, x in detector.items() if name != "norm.mean"}]  # fmt: skip
    for state in wrong:
        with pytest.raises(ValueError, match="here holds .*; expected weight"):
            ScoreHead(state, "none", "none", "here")


# -- presets ----------------------------------------------------------------------------------------------------------
def test_the_preset_of_laion_runs_on_stand_ins_for_its_files(job: Job, clip: ClipScoreConfig, tmp_path: Path) -> None:
    """The heads' files as they were released: pickles, with the released names, for embeddings of 16 numbers."""
    torch.manual_seed(5)
    weights = tmp_path / "outputs/weights"
    weights.mkdir(parents=True)
    shutil.copy(clip.weights, weights / "clip_vit_l_14_openai.safetensors")
    sizes = {0: (16, 32), 2: (32, 8), 4: (8, 8), 6: (8, 4), 7: (4, 1)}
    aesthetic = {f"layers.{i}.{part}": torch.randn(*shape) for i, (into, out) in sizes.items()
                 for part, shape in (("weight", (out, into)), ("bias", (out,)))}  # fmt: skip
    torch.save(aesthetic, weights / "sac+logos+ava1-l14-linearMSE.pth")
    sizes = {1: (16, 8), 2: (8, 32), 3: (32, 16), 4: (16, 1)}
    nsfw = {f"linear_{i}.{part}": 0.1 * torch.randn(*shape) for i, (into, out) in sizes.items()
            for part, shape in (("weight", (out, into)), ("bias", (out,)))}  # fmt: skip
    torch.save({**nsfw, "norm.mean": torch.zeros(16), "norm.variance": torch.ones(16)},
               weights / "clip_ViT-L-14_openai_binary_nsfw_head.pth")  # fmt: skip
    given = ["scores=laion", f"paths.outputs={tmp_path / 'outputs'}", f"dataset.filter_images.clip.model={clip.model}"]
    config = compose(given)
    with pytest.raises(ConfigError, match=r"clip.sha256 is null.*`sha256sum .*clip_vit_l_14_openai.safetensors`"):
        check_scores(config)
    files = {"clip": config.dataset.filter_images.clip, **config.dataset.filter_images.heads}
    hashes = {name: digest(Path(network.weights)) for name, network in files.items()}
    keys = {"clip": "clip", "aesthetic": "heads.aesthetic", "nsfw": "heads.nsfw"}
    given += [f"dataset.filter_images.{keys[name]}.sha256={sha256}" for name, sha256 in hashes.items()]
    config = compose([*given, "dataset.filter_images.min_size=40"])
    check_scores(config)
    assert Dag(config).fingerprints["filter_images"] != Dag(compose([])).fingerprints["filter_images"]
    scored = with_settings(job, config.dataset.filter_images)
    filter_images.run_shard(scored, 0)
    kept = [row for row in rows_of(scored) if not row["verdict"]]
    assert len(kept) == 5 and len({row["aesthetic"] for row in kept}) == 5
    assert all(0 < row["nsfw"] < 1 and -1 <= row["clip_similarity"] <= 1 for row in kept)


@pytest.mark.parametrize("missing, source", [
    ("clip_vit_l_14_openai.safetensors", "open_clip.create_model"), ("sac+logos+ava1-l14-linearMSE.pth", "github.com"),
    ("clip_ViT-L-14_openai_binary_nsfw_head.pth", "CLIP-based-NSFW-Detector"),
])  # fmt: skip
def test_without_its_files_the_preset_says_which_file_where_and_from_where(
    tmp_path: Path, missing: str, source: str
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    config = compose(["scores=laion", f"paths.outputs={tmp_path}"])
    for network in (config.dataset.filter_images.clip, *config.dataset.filter_images.heads.values()):
        Path(network.weights).write_bytes(b"x")
    (weights / missing).unlink()
    with pytest.raises(ConfigError) as error:
        Dag(config)
    said = str(error.value)
    assert f"no file at {weights / missing}" in said and source in said and "put the file there" in said


# -- devices ----------------------------------------------------------------------------------------------------------
def test_a_worker_computes_where_its_cluster_put_it_and_not_on_what_it_sees(
    job: Job, clip: ClipScoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="filter_images.num_gpus is 0.5, but torch .* sees no GPU"):
        device_of(0.5, "filter_images")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(0.5, "filter_images") == torch.device("cuda")
    assert device_of(0, "filter_images") == torch.device("cpu")
    worker = filter_images.Worker(with_settings(job, replace(PLAIN, clip=clip)))  # cluster=local gives it no GPU
    assert worker.scorer.device == torch.device("cpu")


def test_scoring_on_processors_beside_gpus_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    hashes = [f"dataset.filter_images.{key}.sha256=abc" for key in ("clip", "heads.aesthetic", "heads.nsfw")]
    for machines in ("h100", "h100_scores", "local"):
        check_scores(compose(["scores=laion", f"cluster={machines}", *hashes]))
        assert ("scores are computed on processors" in capsys.readouterr().out) == (machines == "h100")


def test_scoring_and_encoding_share_every_gpu_in_equal_parts() -> None:
    """Whatever the order in which Ray places equal parts, as many fit as the GPUs hold; none waits for ever."""
    cluster = compose(["cluster=h100_scores"]).cluster
    plain = compose(["cluster=h100"]).cluster
    scoring, encoding = cluster.filter_images, cluster.precompute_latents
    assert scoring.num_gpus == encoding.num_gpus == 0.5 and plain.filter_images.num_gpus == 0
    assert scoring.num_gpus * scoring.in_flight + encoding.num_gpus * encoding.in_flight <= plain.train.workers


@pytest.mark.slow
def test_workers_on_ray_write_what_one_process_writes(job: Job, clip: ClipScoreConfig) -> None:
    scored = with_settings(job, replace(PLAIN, clip=clip))
    config, seen = compose([]).cluster, []
    with cluster.connect(config):
        step = cluster.Step(scored, config.filter_images, {0}, "pipelines.stages.filter_images")
        cluster.stream([step], [0], lambda stage, record: seen.append(record))
    here = with_settings(job, replace(PLAIN, clip=clip), "here")
    assert [record.files for record in seen] == [filter_images.run_shard(here, 0).files]
