"""Evaluation of generated latents whose recall is known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.config import EvaluationConfig
from pipelines.journal import read_images, read_metrics
from pipelines.manifest import StageFolder, read_json, write_json
from pipelines.stages import evaluate
from pipelines.training_set import input_digests
from tests.pipelines.stages.small_run import (
    CAPTIONS,
    MIXED_CAPTIONS,
    NOT_USED,
    autoencoder,
    latents,
    make_job,
    make_run,
    mix_in,
)

SETTINGS = EvaluationConfig(shuffle_seed=0, pairs=4)
USED = [caption for i, caption in enumerate(CAPTIONS) if i != NOT_USED]


def generated(run: Path, z0: torch.Tensor, prompts: list[tuple[str, bool]]) -> StageFolder:
    folder = StageFolder(run / "generate/87654321", "generate")
    with folder.attempt(None, "f") as attempt:
        save_file({"z0": z0.contiguous()}, attempt.path / "latents.safetensors")
        listed = [{"prompt": prompt, "seen": seen} for prompt, seen in prompts]
        write_json(attempt.path / "prompts.json", {"format": 1, "checkpoint": "step-00000042", "prompts": listed})
        attempt.commit(rows=len(prompts), samples=len(prompts), dropped={}, inputs={})
    return folder


def used_latents() -> torch.Tensor:
    return latents()[[i for i in range(len(CAPTIONS)) if i != NOT_USED]]


def run_evaluate(
    run: Path, z0: torch.Tensor, prompts: list[tuple[str, bool]], mixed: bool = False
) -> dict[str, object]:
    inputs = make_run(run)
    if mixed:
        mix_in(inputs, run / "photos", 0.5)
    inputs["generate"] = generated(run, z0, prompts)
    job = make_job(run, "evaluate", {"evaluation": SETTINGS, "autoencoder": autoencoder(run)}, inputs)
    record = evaluate.run(job)
    assert record.inputs == input_digests(inputs)
    assert job.output.record() == record and job.output.missing_files([record]) == {}
    return read_json(run / "evaluate/metrics.json")


def test_a_model_that_learnt_everything(tmp_path: Path) -> None:
    z0 = torch.cat([used_latents(), torch.zeros(1, 4, 8, 8)])
    figures = run_evaluate(tmp_path, z0, [*((caption, True) for caption in USED), ("purple cow", False)])
    assert figures == {
        "format": 1, "checkpoint": "step-00000042", "prompt_recall@1": 1.0, "prompt_recall@5": 1.0,
        "prompt_recall_candidates": 7, "prompt_recall_prompts": 7, "prompt_recall_shuffled": 0.0,
    }  # fmt: skip
    record = read_json(tmp_path / "evaluate/12345678/record.json")
    assert (record["rows"], record["samples"], record["dropped"]) == (8, 7, {"unseen_prompt": 1})
    assert read_metrics(tmp_path, "evaluate")["prompt_recall@1"][0][1] == 1.0
    [(step, picture)] = next(iter(read_images(tmp_path, "evaluate").values()))
    assert step == 42 and picture.is_file()


def test_a_model_that_mixes_two_up(tmp_path: Path) -> None:
    z0 = used_latents()[[1, 0, 2, 3, 4, 5, 6]]
    figures = run_evaluate(tmp_path, z0, [(caption, True) for caption in USED])
    assert figures["prompt_recall@1"] == pytest.approx(5 / 7)


def test_what_was_mixed_in_is_among_the_candidates(tmp_path: Path) -> None:
    z0 = torch.cat([used_latents(), latents(8)[[1, 4]]])
    prompts = [(caption, True) for caption in [*USED, MIXED_CAPTIONS[1], MIXED_CAPTIONS[4]]]
    figures = run_evaluate(tmp_path, z0, prompts, mixed=True)
    assert (figures["prompt_recall@1"], figures["prompt_recall_candidates"]) == (1.0, 15)


def test_a_sample_that_was_not_trained_on_is_no_candidate(tmp_path: Path) -> None:
    """Every latent is that of the sample which the selection leaves out: nothing of it may be found again."""
    z0 = latents()[NOT_USED].expand(7, -1, -1, -1).clone()
    figures = run_evaluate(tmp_path, z0, [(caption, True) for caption in USED])
    assert figures["prompt_recall_candidates"] == 7
    assert figures["prompt_recall@1"] == pytest.approx(1 / 7), "one latent is the nearest for all"


def test_pairs_show_generated_beside_trained(tmp_path: Path) -> None:
    run_evaluate(tmp_path, used_latents(), [(caption, True) for caption in USED])
    image = np.asarray(Image.open(io.BytesIO((tmp_path / "evaluate/pairs.png").read_bytes())).convert("RGB"))
    tile = image[45 : 45 + 50, 14 : 14 + 120].astype(int)  # inside the first pair: two pictures of 64 pixels
    assert np.abs(tile[:, 4:54] - tile[:, 68:118]).max() <= 1, "a latent that was learnt is drawn as its picture"
    assert tile[:, 4:54].std() > 1


def test_prompts_that_were_never_trained_on_have_no_recall(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generation.prompts=null"):
        run_evaluate(tmp_path, torch.zeros(1, 4, 8, 8), [("purple cow", False)])
