"""Measures generated pictures: prompt recall over every training latent, and the control with shuffled captions.

generate/1a2b3c4d/ + precompute_latents/ -> evaluate/5e6f7a8b/{metrics.json, pairs.png}, newest also at evaluate/
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import AutoencoderSettings, EvaluationConfig
from ldm.evaluation.prompt_recall import Recall, prompt_recall, shuffled_recall
from ldm.generate import decode
from ldm.models.autoencoder import load_autoencoder
from ldm.shards import decode_array
from ldm.sheet import Tile, draw_sheet
from pipelines.dag import Job
from pipelines.journal import Journal, journal_path
from pipelines.manifest import Record, read_json, write_json, write_whole
from pipelines.training_set import Sample, autoencoder_settings, input_digests, latent_field, trained_on

COLUMNS = 4
DECODE_BATCH = 32


def run(job: Job) -> Record:
    """Measures what `generate` drew and commits figures and pairs."""
    settings: EvaluationConfig = job.what["evaluation"]
    torch.set_num_threads(job.how.cluster.whole_threads)
    drawn = read_json(job.inputs["generate"] / "prompts.json")
    seen = [i for i, prompt in enumerate(drawn["prompts"]) if prompt["seen"]]
    if not seen:
        raise ValueError(
            "none of the generated pictures has a training caption as its prompt, so there is no recall to measure; "
            "generation.prompts=null draws them all"
        )
    prompts = [drawn["prompts"][i]["prompt"] for i in seen]
    z0 = load_file(job.inputs["generate"] / "latents.safetensors")["z0"][seen]
    samples = [sample for _, sample in trained_on(job.inputs)]
    training = clean_latents(samples, job.what["autoencoder"])
    prompt, caption = number_captions(prompts, [sample.caption for sample in samples])
    recall = prompt_recall(z0, training, prompt, caption)
    control = shuffled_recall(z0, training, prompt, caption, settings.shuffle_seed)
    figures = {**figures_of(recall, control, len(samples)), "checkpoint": drawn["checkpoint"]}
    pairs = draw_pairs(job, z0, training, recall, prompts, prompt, caption)
    with job.output.attempt(None, job.fingerprint) as attempt:
        write_json(attempt.path / "metrics.json", figures)
        (attempt.path / "pairs.png").write_bytes(pairs)
        write_json(job.output.path.parent / "metrics.json", figures)
        write_whole(job.output.path.parent / "pairs.png", pairs)
        record = attempt.commit(
            rows=len(drawn["prompts"]),
            samples=len(seen),
            dropped={"unseen_prompt": len(drawn["prompts"]) - len(seen)},
            inputs=input_digests(job.inputs),
            facts=figures,
        )
    _tell(job, figures)
    return record


def _tell(job: Job, figures: dict[str, Any]) -> None:
    journal = Journal(journal_path(job.how.run, job.stage, "worker"))
    journal.metrics({name: value for name, value in figures.items() if name.startswith("prompt_recall")})
    journal.artifact(job.output / "metrics.json")
    journal.image(f"pairs {job.output.path.name}", job.output / "pairs.png", int(figures["checkpoint"].split("-")[1]))
    journal.close()


def clean_latents(samples: list[Sample], autoencoder: AutoencoderSettings) -> Tensor:
    """The scaled means of the samples' posteriors (m, c, h, w): what the denoiser is to find again."""
    channels, field = autoencoder.network.latent_channels, latent_field(autoencoder)
    means = [decode_array(sample.fields[field])[:channels].astype(np.float32) for sample in samples]
    return autoencoder.scale_factor * torch.from_numpy(np.stack(means))


def number_captions(prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor]:
    """A number for each prompt (n,) and each caption (m,); equal texts have equal numbers."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[prompt] for prompt in prompts]), torch.tensor([numbers[c] for c in captions])


def figures_of(recall: Recall, control: Recall, candidates: int) -> dict[str, Any]:
    """What metrics.json holds."""
    return {
        "format": 1,
        "prompt_recall@1": recall.at(1),
        "prompt_recall@5": recall.at(5),
        "prompt_recall_prompts": len(recall.right),
        "prompt_recall_candidates": candidates,
        "prompt_recall_shuffled": control.at(1),
    }


def draw_pairs(
    job: Job, z0: Tensor, training: Tensor, recall: Recall, prompts: list[str], prompt: Tensor, caption: Tensor
) -> bytes:
    """A PNG of generated pictures beside the training picture of their prompt, framed green when right."""
    settings: EvaluationConfig = job.what["evaluation"]
    count = min(settings.pairs, len(prompts))
    shown = [i * len(prompts) // count for i in range(count)]
    own = [int((caption == prompt[i]).nonzero()[0]) for i in shown]
    given = autoencoder_settings(job)
    autoencoder = load_autoencoder(given, torch.device("cpu"))
    image = decode(autoencoder, torch.cat([z0[shown], training[own]]), given.scale_factor, DECODE_BATCH)
    tiles = [
        Tile([image[k], image[count + k]], prompts[i], right=bool(recall.right[i])) for k, i in enumerate(shown)
    ]
    heading = f"Generated beside the training picture; {recall.at(1):.0%} of {len(prompts)} prompts are right"
    return draw_sheet([(heading, tiles)], COLUMNS)
