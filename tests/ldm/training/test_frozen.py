"""A frozen CLIP text tower beside the engine: nobody shares it out, trains it or keeps it but for its hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config import ClipTowerConfig, SampleGridConfig, TrainSettings
from ldm.encode_text import CaptionEncoder
from ldm.models.clip import ClipTextEncoder
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.shards import CorruptSample, ShardWriter, encode_array, iterate_tar
from ldm.training import checks
from ldm.training import train as loop
from ldm.training.checkpoint import newest, step_name
from ldm.training.frozen import Frozen
from ldm.training.loader import Draw, Loader, TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, SEED, TEXT_ENCODER, UNET, settings, write_data

TOWER = ClipTowerConfig(width=8, layers=2, heads=2, activation="gelu", skip_layers=1, final_norm=True, projection=None,
                        pad=0)  # fmt: skip
CLIP = replace(TEXT_ENCODER, kind="clip", layers=None, heads=None, head_width=None, towers={"tiny": TOWER},
               tokenizer="clip", vocab_size=49408,
               vocab_sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")  # fmt: skip
GRID = SampleGridConfig(every_steps=4, prompts=["0 1"], steps=2, guidance_scale=2.0)


def weights(folder: Path, seed: int) -> str:
    """A file with a tower of random numbers."""
    torch.manual_seed(seed)
    path = folder / f"tower-{seed}.safetensors"
    save_file(ClipTextEncoder(CLIP).state_dict(), path)
    return str(path)


def clip_settings(path: str, **training: Any) -> TrainSettings:
    what = settings(max_steps=4, warmup_steps=2, log_every_steps=1, **training)
    return replace(what, text_encoder=replace(CLIP, weights=path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14])


def watched(what: TrainSettings, data: TrainData, output: Path, stage: int) -> dict[str, Any]:
    """A run, with what the engine was given and what became of the frozen part."""
    seen: dict[str, Any] = {}

    class Watching(loop.Engine):
        def __init__(self, module: torch.nn.Module, *args: Any) -> None:
            super().__init__(module, *args)
            seen["held"] = [name for name, _ in module.named_parameters()] + list(self.parameters)

    class WatchingFrozen(Frozen):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen["frozen"] = self

    loop.Engine, loop.Frozen = Watching, WatchingFrozen
    result = work(what, data, output, replace(RUN, zero_stage=stage))
    tower = seen["frozen"].text_encoder.state_dict()
    return {**result, "held": seen["held"], "tower": {name: x.clone() for name, x in tower.items()}}


def test_every_stage_trains_beside_the_same_tower_and_keeps_its_hash_alone(data: TrainData, tmp_path: Path) -> None:
    path = weights(tmp_path, SEED + 1)
    what = clip_settings(path, held_out_shards=1, validate_every_steps=4, validation_samples=8)
    losses = {}
    for stage in (0, 3):
        output = tmp_path / str(stage)
        first, second = processes.run(watched, what, data, output, stage, world_size=2)
        assert not isinstance(first, Exception), first
        losses[stage] = [value for _, values in first["logged"] for name, value in values.items() if "loss" in name]
        assert [name for name in first["held"] if name.startswith("text_encoder")] == [] and first["held"]
        for result in (first, second):  # whole on each process, and as it was in the file
            assert all(torch.equal(result["tower"][name], x) for name, x in load_file(path).items())
        files = sorted((output / step_name(4)).glob("*.safetensors"))
        assert len(files) == 3 and not any("text_encoder" in name for file in files for name in load_file(file))
        frozen = json.loads((output / step_name(4) / "config.json").read_text())["frozen"]
        assert frozen == Frozen(make_denoiser(UNET, what.text_encoder), "float32").digests()
    assert losses[3] == pytest.approx(losses[0], rel=1e-4)


def test_it_does_not_go_on_beside_another_tower(data: TrainData, tmp_path: Path) -> None:
    run = replace(RUN, micro_batch_size=8)
    paths = [weights(tmp_path, SEED + n) for n in (1, 2)]
    (first,) = processes.run(work, clip_settings(paths[0], grid=GRID), data, tmp_path / "train", run)
    assert first["step"] == 4 and len(first["grids"]) == 1
    moved = Path(paths[0]).rename(tmp_path / "moved.safetensors")  # where the file lies does not matter
    (again,) = processes.run(work, clip_settings(str(moved)), data, tmp_path / "train", run)
    assert again["step"] == 4
    (error,) = processes.run(work, clip_settings(paths[1]), data, tmp_path / "train", run)
    assert isinstance(error, ValueError) and "text_encoder: '" in str(error) and "name=OTHER" in str(error)
    last = newest(tmp_path / "train")
    assert last is not None and last.config["frozen"].keys() == {"text_encoder"}


def with_contexts(data: TrainData, folder: Path, path: str) -> TrainData:
    """The same latents, with what a tower makes of each caption beside it."""
    folder.mkdir()
    encoder = CaptionEncoder(replace(CLIP, weights=path), torch.device("cpu"), batch_size=4, precision="float32",
                             threads=1)  # fmt: skip
    infos = []
    for info in data.shards:
        writer = ShardWriter(folder / Path(info.tar).name, folder / Path(info.index).name)
        for key, fields in iterate_tar(info.tar):
            context = encoder.encode([fields["txt"].decode()])[0].half().numpy()
            writer.write(key, {**fields, "context.npy": encode_array(context)})
        writer.close()
        sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
        infos.append(replace(info, tar=str(writer.tar), index=str(writer.index), index_sha256=sha256))
    return replace(data, shards=infos, context_shape=[CLIP.length, CLIP.width])


def test_training_reads_contexts_from_the_cache_as_it_would_make_them(data: TrainData, tmp_path: Path) -> None:
    path = weights(tmp_path, SEED + 1)
    what = clip_settings(path, caption_dropout=0.5, held_out_shards=1, validate_every_steps=8, validation_samples=8)
    what = replace(what, training=replace(what.training, max_steps=16, learning_rate=0.02, lr_schedule="constant"))
    losses = []
    for each in (data, with_contexts(data, tmp_path / "contexts", path)):
        output, run = tmp_path / f"train-{len(losses)}", replace(RUN, micro_batch_size=8, checkpoint_every_steps=100)
        (result,) = processes.run(work, what, each, output, run)
        assert not isinstance(result, Exception), result
        losses.append([value for _, values in result["logged"] for name, value in values.items() if "loss" in name])
    # The cache holds fp16, so that they are nearly equal; and that they are not quite shows that contexts are seen.
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_dropped_caption_has_the_context_of_the_empty_one(data: TrainData, tmp_path: Path) -> None:
    path = weights(tmp_path, SEED + 1)
    made, null = with_contexts(data, tmp_path / "contexts", path), np.full((CLIP.length, CLIP.width), 7, np.float16)
    options = {"lanes": 2, "window_shards": 2, "batch_size": 16, "micro_batch_size": 16}
    batch = Loader(made, Draw(SEED, 1000, 0.5), make_tokenizer(CLIP), null_context=null, **options).batch(range(16))
    tokens = Loader(data, Draw(SEED, 1000, 0.5), make_tokenizer(CLIP), **options).batch(range(16)).condition["tokens"]
    assert batch.condition.keys() == {"context"} and batch.condition["context"].dtype == torch.float16
    tower = ClipTextEncoder(CLIP)
    tower.load_state_dict(load_file(path))
    with torch.no_grad():
        expected = tower.eval()(tokens)
    dropped = (tokens == make_tokenizer(CLIP).null).all(1)
    assert 0 < dropped.sum() < 16 and (batch.condition["context"][dropped] == 7).all()
    torch.testing.assert_close(batch.condition["context"][~dropped].float(), expected[~dropped], atol=2e-3, rtol=2e-3)
    with pytest.raises(CorruptSample, match=r"has .'moments.npy', 'txt'., not context.npy"):
        Loader(replace(data, context_shape=[CLIP.length, CLIP.width]), Draw(SEED, 1000, 0.5), None, **options).batch(
            range(2)
        )


def test_what_it_makes_of_tokens_is_what_the_whole_model_would_read() -> None:
    torch.manual_seed(SEED)
    whole, split = make_denoiser(UNET, CLIP), make_denoiser(UNET, CLIP)
    split.load_state_dict(whole.state_dict())
    frozen = Frozen(split, "float32")
    tokens, z_t, t = torch.randint(0, 49408, (3, CLIP.length)), torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    condition: dict[str, Tensor] = {"tokens": tokens}
    assert split.text_encoder is None and torch.equal(whole.eval()(z_t, t, condition),
                                                      split.eval()(z_t, t, frozen.encode(condition)))  # fmt: skip
    assert frozen.encode({"tokens": tokens, "vector": z_t}).keys() == {"context", "vector"}
    trained = make_denoiser(UNET, TEXT_ENCODER)
    assert Frozen(trained, "float32").encode(condition) is condition and trained.text_encoder is not None


def test_a_frozen_encoder_cannot_have_a_canvas() -> None:
    with pytest.raises(ValueError, match="text_encoder.canvas is .* set it to null"):
        checks.check(replace(settings(), text_encoder=replace(CLIP, canvas=[2, 4, 4])))
