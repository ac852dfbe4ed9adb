"""The stage from a real checkpoint of a small network to pictures on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ldm.config import (
    DiffusionConfig,
    GenerationConfig,
    SampleGridConfig,
    TextEncoderConfig,
    TrainingConfig,
    UNetConfig,
)
from ldm.generate import load_painter
from ldm.models.denoiser import make_denoiser
from ldm.training import checkpoint, saving
from pipelines.journal import read_images
from pipelines.manifest import read_json
from pipelines.stages import generate
from pipelines.training_set import input_digests
from tests.ldm.test_generate import CONFIG, TEXT, UNET
from tests.pipelines.stages.small_run import (
    CAPTIONS,
    MIXED_CAPTIONS,
    NOT_USED,
    autoencoder,
    make_job,
    make_run,
    mix_in,
)

SETTINGS = dataclasses.replace(CONFIG, unseen_prompts=["purple cow", "moon", "cat"], steps=2, grid_pictures=3)
USED = [caption for i, caption in enumerate(CAPTIONS) if i != NOT_USED]
DIFFUSION = DiffusionConfig(
    timesteps=1000, schedule="sqrt_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=False,
    prediction="eps", loss="l2", min_snr_gamma=None, offset_noise=0.0,
)  # fmt: skip


def write_checkpoint(train: Path, unet: UNetConfig = UNET, text: TextEncoderConfig | None = TEXT) -> None:
    torch.manual_seed(1)
    denoiser = make_denoiser(unet, text)
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    settings = {
        "unet": dataclasses.asdict(unet), "text_encoder": dataclasses.asdict(text) if text else None,
        "diffusion": dataclasses.asdict(DIFFUSION), "training": _training(),
    }  # fmt: skip
    config = {"settings": settings, "data": {"latent_shape": [4, 8, 8]}}
    saving.save(train, 42, stretches=[], ema=denoiser.state_dict(), config=config, facts={"samples_seen": 0})


def _training() -> dict[str, object]:
    """The settings of the training are read with the others and decide nothing here."""
    grid = dict.fromkeys(field.name for field in dataclasses.fields(SampleGridConfig))
    return {**dict.fromkeys(field.name for field in dataclasses.fields(TrainingConfig)), "grid": grid}


def run_generate(run: Path, settings: GenerationConfig = SETTINGS) -> Path:
    inputs = make_run(run)
    write_checkpoint(inputs["train"].path)
    job = make_job(run, "generate", {"generation": settings, "autoencoder": autoencoder(run)}, inputs)
    record = generate.run(job)
    assert record.inputs == input_digests(inputs)
    assert job.output.record() == record and job.output.missing_files([record]) == {}
    return job.output.path


def test_every_training_caption_and_the_unseen_ones_are_drawn(tmp_path: Path) -> None:
    folder = run_generate(tmp_path)
    prompts = read_json(folder / "prompts.json")
    assert prompts["checkpoint"] == "step-00000042"
    expected = [(caption, True) for caption in USED] + [("purple cow", False), ("moon", False), ("cat", True)]
    assert [(prompt["prompt"], prompt["seen"]) for prompt in prompts["prompts"]] == expected
    z0 = load_file(folder / "latents.safetensors")["z0"]
    assert z0.shape == (10, 4, 8, 8) and z0.isfinite().all() and z0.std() > 0.1
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    images = [f"images/{i:06d}.png" for i in range(10)]
    assert names == ["grid.png", *images, "latents.safetensors", "prompts.json", "record.json"]
    assert Image.open(folder / images[0]).size == (64, 64)


@pytest.mark.parametrize("weight, theirs", [(0.5, [0, 2, 4, 6]), (3.0, range(8)), (0.01, [])])
def test_captions_of_runs_that_were_mixed_in_are_drawn_by_weight(
    tmp_path: Path, weight: float, theirs: list[int]
) -> None:
    inputs = make_run(tmp_path)
    mix_in(inputs, tmp_path / "photos", weight)
    job = make_job(tmp_path, "generate", {"generation": SETTINGS, "autoencoder": autoencoder(tmp_path)}, inputs)
    captions, weights = generate.captions_of(job), generate.weights_of(job)
    assert captions == {"": USED, "photos": MIXED_CAPTIONS} and weights == {"photos": weight}
    prompts = generate.choose_prompts(SETTINGS, captions, weights)
    expected = [(caption, True) for caption in [*USED, *(MIXED_CAPTIONS[i] for i in theirs)]]
    unseen = [("purple cow", False), ("moon", False), ("cat", True)]
    assert [(prompt["prompt"], prompt["seen"]) for prompt in prompts] == [*expected, *unseen]
    named = dataclasses.replace(SETTINGS, prompts=["photo of a cow"], unseen_prompts=[])
    assert generate.choose_prompts(named, captions, weights) == [{"prompt": "photo of a cow", "seen": True}]


def test_the_newest_grid_lies_at_a_fixed_place(tmp_path: Path) -> None:
    folder = run_generate(tmp_path)
    assert (tmp_path / "generate/grid.png").read_bytes() == (folder / "grid.png").read_bytes()
    [(step, picture)] = next(iter(read_images(tmp_path, "generate").values()))
    assert step == 42 and picture == folder / "grid.png"


def test_twice_the_same_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [run_generate(tmp_path / name) for name in "ab"]
    for name in ("latents.safetensors", "grid.png", "images/000003.png"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_named_prompts_are_drawn_instead(tmp_path: Path) -> None:
    folder = run_generate(tmp_path, dataclasses.replace(SETTINGS, prompts=["zebra", "nothing of this"]))
    prompts = [prompt["prompt"] for prompt in read_json(folder / "prompts.json")["prompts"]]
    assert prompts == ["zebra", "nothing of this", "purple cow", "moon", "cat"]


def test_the_grid_has_a_heading_for_unseen_prompts(tmp_path: Path) -> None:
    """Without unseen prompts the sheet is lower by a heading and a row."""
    unseen = dataclasses.replace(SETTINGS, unseen_prompts=["purple cow", "moon"])
    with_unseen = Image.open(run_generate(tmp_path / "a", unseen) / "grid.png")
    without = Image.open(run_generate(tmp_path / "b", dataclasses.replace(SETTINGS, unseen_prompts=[])) / "grid.png")
    assert with_unseen.width == without.width and with_unseen.height == 2 * without.height
    assert np.array_equal(np.asarray(with_unseen)[: without.height], np.asarray(without))


def test_too_many_captions_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_CAPTIONS", 6)  # of seven
    with pytest.raises(ValueError, match="name them in generation.prompts"):
        run_generate(tmp_path / "a")
    folder = run_generate(tmp_path / "b", dataclasses.replace(SETTINGS, prompts=["cat"]))
    assert {prompt["seen"] for prompt in read_json(folder / "prompts.json")["prompts"]} == {None}


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    write_checkpoint(inputs["train"].path)
    folder = inputs["train"].path / "step-00000042"
    config = read_json(folder / "config.json")
    config["settings"]["unet"]["channel_mult"] = [1, 2, 2]
    config["settings"]["unet"]["transformer_depth"] = [1, 1, 1]
    wrong = checkpoint.Checkpoint(folder, read_json(folder / "manifest.json"), config)
    with pytest.raises(ValueError, match="does not hold the weights of the config.json"):
        load_painter(wrong, torch.device("cpu"))


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    job = make_job(tmp_path, "generate", {"generation": SETTINGS, "autoencoder": autoencoder(tmp_path)}, inputs)
    with pytest.raises(FileNotFoundError, match=r"\+stage=train"):
        generate.run(job)
