"""T8: a loss that is no number reaches no weight, whether or not its gradient would have told."""

from __future__ import annotations

import importlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import TrainingRunConfig, TrainSettings
from ldm.training.checkpoint import newest
from ldm.training.loader import Batch, TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data

BAD = range(48, 56)  # positions of the samples of step 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 6])


def injected(
    guard: bool, what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig
) -> dict[str, Any]:
    """A run whose last process adds to a loss of step 7 what is no number, and has no gradient."""
    train = importlib.import_module("ldm.training.train")
    loss_of = train.loss_of

    def with_a_hole(diffusion: Any, schedule: Any, prediction: Tensor, batch: Batch) -> Tensor:
        loss = loss_of(diffusion, schedule, prediction, batch)
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return loss + math.nan if last and int(batch.positions[0]) in BAD else loss

    train.loss_of = with_a_hole
    if not guard:
        train.refusable = Tensor.mean
    return work(what, data, output, run)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_a_loss_that_is_no_number_reaches_no_weight_where_its_gradient_is_one(
    data: TrainData, tmp_path: Path, stage: int
) -> None:
    what = settings(max_steps=10, precision="bf16" if stage else "bf16_autocast")
    run = replace(RUN, zero_stage=stage, checkpoint_every_steps=100)
    guarded, unguarded = (
        processes.run(injected, guard, what, data, tmp_path / str(guard), run, world_size=2) for guard in (True, False)
    )
    assert all(isinstance(error, RuntimeError) and error.stops_the_run for error in guarded)
    message = str(guarded[0])
    assert message == str(guarded[1])
    assert "the loss is not finite at step 7; the weights are still those of step 6" in message
    assert "process 1: " in message and "process 0: " not in message
    (note,) = (json.loads(path.read_text()) for path in (tmp_path / "True" / "skipped").iterdir())
    assert note["step"] == 7 and [len(keys) for keys in note["keys"].values()] == [4]
    # What was learned before is kept, though no checkpoint was due.
    last = newest(tmp_path / "True")
    assert last is not None and last.step == 6 and last.manifest["samples_seen"] == BAD[0]
    weights = load_file(last.path / "ema.safetensors").values()
    assert all(bool(weight.isfinite().all()) for weight in weights)
    # The twin: by the gradient alone nobody would know.
    print(f"T8: stage {stage}: refused at step 7 with step {last.step} kept; "
          f"without the guard it goes on to step {unguarded[0]['step']}")  # fmt: skip
    assert [result["step"] for result in unguarded] == [10, 10]


def test_what_the_refusal_names_goes_on_in_place(data: TrainData, tmp_path: Path) -> None:
    """Without the samples it names, to the bits of a run that left the batch out by itself."""
    run = replace(RUN, checkpoint_every_steps=100)

    def ends(output: str, **training: Any) -> Any:
        what = settings(max_steps=10, lr_schedule="constant", **training)
        return processes.run(injected, True, what, data, tmp_path / output, run, world_size=2)[0]

    error = ends("refused")
    assert "training.skip_samples=[48,56]" in str(error) and "max_skipped_batches is 0" in str(error)
    assert ends("refused", skip_samples=[BAD.start, BAD.stop])["step"] == 10
    assert ends("left out", max_skipped_batches=1)["step"] == 10
    assert weights_of(tmp_path / "refused", 10) == weights_of(tmp_path / "left out", 10)
    last = newest(tmp_path / "refused")
    assert last is not None and last.manifest["samples_seen"] == 88
    assert last.manifest["history"] == [{"step": 6, "skipped_samples": [48, 56]}]
