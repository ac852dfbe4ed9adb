"""Draws pictures from the newest checkpoint: by default one for every caption that was trained on, and some new ones.

Of captions that dataset.mixture brought in, those of a run with weight 0.5 are drawn half as often as this run's own.

train/step-00001000/ -> generate/1a2b3c4d/{latents.safetensors, prompts.json, images/000042.png, grid.png}

The folder is named by the settings and by what they were applied to, so other prompts never overwrite these; the
newest grid is also found at generate/grid.png. Picture n is drawn from prompt n of prompts.json and from noise that
depends on (seed, n) alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import GenerationConfig
from ldm.generate import decode, draw_latents, load_painter
from ldm.models.autoencoder import load_autoencoder
from ldm.sheet import Tile, draw_sheet, to_picture
from ldm.training.checkpoint import newest
from pipelines.dag import Job
from pipelines.devices import device_of
from pipelines.journal import Journal, journal_path
from pipelines.manifest import Record, write_json, write_whole
from pipelines.training_set import autoencoder_settings, input_digests, samples_of, trained_on

MAX_CAPTIONS = 10_000  # that are drawn without being named: more is no oversight only if it is written down
COLUMNS = 6
HEADINGS = {
    True: "Drawn from captions of the training set",
    False: "Drawn from prompts that no training sample has",
    None: "Drawn from prompts",
}


def run(job: Job) -> Record:
    """Draws every prompt and commits latents, pictures and grid."""
    settings: GenerationConfig = job.what["generation"]
    torch.set_num_threads(job.how.cluster.whole_threads)
    device = device_of(job.how.cluster.whole.num_gpus, "whole")
    prompts = choose_prompts(settings, captions_of(job), weights_of(job))
    autoencoder = autoencoder_settings(job)
    checkpoint = newest(job.inputs["train"].path)
    if checkpoint is None:
        raise FileNotFoundError(f"{job.inputs['train'].path} has no checkpoint; run +stage=train first")
    painter = load_painter(checkpoint, device)
    z0 = draw_latents(painter, [prompt["prompt"] for prompt in prompts], settings)
    image = decode(load_autoencoder(autoencoder, device), z0, autoencoder.scale_factor, settings.batch_size)
    grid = draw_grid(image, prompts, settings.grid_pictures)
    with job.output.attempt(None, job.fingerprint) as attempt:
        save_file({"z0": z0.contiguous()}, attempt.path / "latents.safetensors")
        write_json(attempt.path / "prompts.json", {"format": 1, "checkpoint": checkpoint.path.name, "prompts": prompts})
        write_pictures(attempt.path / "images", image)
        (attempt.path / "grid.png").write_bytes(grid)
        write_whole(job.output.path.parent / "grid.png", grid)
        record = attempt.commit(rows=len(prompts), samples=len(prompts), dropped={}, inputs=input_digests(job.inputs))
    journal = Journal(journal_path(job.how.run, job.stage, "worker"))
    journal.image(f"grid {job.output.path.name}", job.output / "grid.png", checkpoint.step)
    journal.close()
    return record


def captions_of(job: Job) -> dict[str, list[str]] | None:
    """The captions that were trained on, of this run ("") and of those mixed in; None: too many to look through."""
    if samples_of(job.inputs) > MAX_CAPTIONS:
        return None
    captions: dict[str, list[str]] = {"": []}
    for run, sample in trained_on(job.inputs):
        captions.setdefault(run, []).append(sample.caption)
    return captions


def weights_of(job: Job) -> dict[str, float]:
    """How often each run that is mixed in was trained on, as against this one, from the plan of `train`."""
    plan = job.inputs["train"].read_plan() or {"what": {}}
    return plan["what"].get("dataset.mixture", {})


def drawn(captions: dict[str, list[str]], weights: dict[str, float]) -> list[str]:
    """This run's captions, and of those mixed in so many as their weight says, spread evenly."""
    chosen = list(captions[""])
    for run, weight in sorted(weights.items()):
        theirs = captions.get(run, [])
        count = min(len(theirs), round(weight * len(captions[""])))
        chosen += [theirs[i * len(theirs) // count] for i in range(count)]
    return chosen


def choose_prompts(
    settings: GenerationConfig, captions: dict[str, list[str]] | None, weights: dict[str, float]
) -> list[dict[str, Any]]:
    """[{prompt, seen}]: the prompts in order, and whether a training sample has them as its caption (None: unknown)."""
    if settings.prompts is not None:
        chosen = settings.prompts
    elif captions is not None:
        chosen = drawn(captions, weights)
    else:
        raise ValueError(
            f"generation.prompts is null, which asks for a picture of each caption that was trained on; that is done "
            f"for {MAX_CAPTIONS} at most, and there are more: name them in generation.prompts"
        )
    known = None if captions is None else {caption for each in captions.values() for caption in each}
    prompts = [*chosen, *settings.unseen_prompts]
    return [{"prompt": prompt, "seen": None if known is None else prompt in known} for prompt in prompts]


def draw_grid(image: Tensor, prompts: list[dict[str, Any]], pictures: int) -> bytes:
    """A PNG with some pictures of training captions, spread evenly, and all those of other prompts, labelled."""
    tiles = [Tile([image[i]], prompt["prompt"]) for i, prompt in enumerate(prompts)]
    by_seen = {seen: [t for t, p in zip(tiles, prompts, strict=True) if p["seen"] is seen] for seen in HEADINGS}
    count = min(len(by_seen[True]), pictures)
    by_seen[True] = [by_seen[True][i * len(by_seen[True]) // count] for i in range(count)]
    return draw_sheet([(heading, by_seen[seen]) for seen, heading in HEADINGS.items()], COLUMNS)


def write_pictures(folder: Path, image: Tensor) -> None:
    folder.mkdir()
    for i, picture in enumerate(image):
        to_picture(picture).save(folder / f"{i:06d}.png")
