"""The whole loop on two processes: stopped and resumed to the bit, stopped by what is no number, seen from outside."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import SampleGridConfig, TrainingRunConfig, TrainSettings, from_plain
from ldm.models.denoiser import make_denoiser
from ldm.shards import ShardInfo, ShardWriter, encode_array
from ldm.training import checkpoint
from ldm.training.budget import costs_of
from ldm.training.checkpoint import newest, step_name
from ldm.training.loader import TrainData
from ldm.training.train import train
from tests.ldm.training import processes
from tests.ldm.training.tiny import RUN, SHAPE, settings, write_data

GRID = SampleGridConfig(every_steps=4, prompts=["0 1", "1 2", "what"], steps=2, guidance_scale=2.0)


def work(
    what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig, stop_at: int | None = None
) -> dict[str, Any]:
    """One process of a training run; the last one asks to stop after `stop_at` steps: -1 before anything is loaded."""
    logged: list[tuple[int, dict[str, float]]] = []
    grids: list[tuple[int, bytes, str]] = []
    asked = [-2]  # before anything is loaded, and before the first step

    def should_stop() -> bool:
        asked[0] += 1
        return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and asked[0] == stop_at

    def decode(z0: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(z0[:, [0, 1, 0]], scale_factor=8).clamp(-1, 1)

    step = train(
        what, data, output, run, decode=decode, log=lambda *a: logged.append(a), log_grid=lambda *a: grids.append(a),
        should_stop=should_stop,
    )  # fmt: skip
    return {"step": step, "logged": logged, "grids": grids}


def two(*args: Any) -> list[Any]:
    return processes.run(work, *args, world_size=2)


def weights_of(output: Path, step: int) -> dict[str, bytes]:
    """Everything that a checkpoint holds of the model and the optimizer, bit for bit."""
    found = {}
    for path in sorted((output / step_name(step)).glob("*.safetensors")):
        found |= {f"{path.name}/{name}": x.numpy().tobytes() for name, x in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 6], [None, [i != 3 for i in range(14)], None])


# ---- T1 ----------------------------------------------------------------------------------------------------
RUN_2 = replace(RUN, zero_stage=2, checkpoint_every_steps=100)


@pytest.fixture(scope="module")
def straight(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """40 steps without a stop."""
    output = tmp_path_factory.mktemp("straight")
    return output, two(settings(), data, output, RUN_2)


def test_twenty_steps_and_twenty_more_are_forty_to_the_bit(
    data: TrainData, straight: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    output, whole = straight
    first = two(settings(), data, tmp_path, RUN_2, 20)
    assert [r["step"] for r in first] == [20, 20]  # one process wanted to stop, both did, and nothing was lost
    rest = two(settings(), data, tmp_path, replace(RUN_2, loader_workers=2))
    assert [r["step"] for r in rest] == [40, 40]
    assert weights_of(tmp_path, 40) == weights_of(output, 40)
    assert [values["loss"] for _, values in first[0]["logged"] + rest[0]["logged"]] == [
        values["loss"] for _, values in whole[0]["logged"]
    ]
    print(f"T1: {len(weights_of(output, 40))} tensors of weights, averages and optimizer states are equal to the bit")


def forgetful(part: str, *args: Any) -> dict[str, Any]:
    """A run that goes on without one thing that its checkpoint holds."""
    train = importlib.import_module("ldm.training.train")
    if part == "averages":
        train.Ema.restore = lambda *_: None
    elif part == "states":
        read = train.checkpoint.Checkpoint.read
        train.checkpoint.Checkpoint.read = lambda self, kind, *at: read(self, kind, *at) * (kind == "weight")
    elif part == "dropout":
        train.seed_dropout = lambda seed, batch: None
    else:
        loader = importlib.import_module("ldm.training.loader").Loader
        batches = loader.batches
        loader.batches = lambda self, seen: batches(self, 0)
    return work(*args)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["averages", "states", "samples", "dropout"])
def test_a_run_that_forgets_anything_ends_in_other_bits(
    data: TrainData, straight: tuple[Path, list[Any]], tmp_path: Path, part: str
) -> None:
    """The twin of T1: each of its guards off."""
    two(settings(), data, tmp_path, RUN_2, 20)
    rest = processes.run(forgetful, part, settings(), data, tmp_path, RUN_2, world_size=2)
    assert [r["step"] for r in rest] == [40, 40]
    there, here = weights_of(straight[0], 40), weights_of(tmp_path, 40)
    other = sum(here[name] != x for name, x in there.items())
    print(f"T1, its twin without {part}: {other} of {len(there)} tensors differ")
    assert other


# ---- T3 ----------------------------------------------------------------------------------------------------
def without_dropout() -> TrainSettings:
    """Inside the network, where its draws depend on who computes which sample."""
    what = settings(log_every_steps=1)
    return replace(what, unet=replace(what.unet, dropout=0.0))


@pytest.fixture(scope="module")
def never_moved(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """40 steps of two processes, and their losses."""
    output = tmp_path_factory.mktemp("two")
    first, _ = two(without_dropout(), data, output, RUN_2)
    return output, [values["loss"] for _, values in first["logged"]]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 1, 2)], ids=str)
def test_another_number_of_processes_goes_on_within_a_thousandth(
    data: TrainData, never_moved: tuple[Path, list[float]], tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """At other ZeRO stages too. Every loss is that of the run that never moved, also the first one after a move."""
    losses: list[float] = []
    for i, world_size in enumerate(sizes):
        stop_at = None if i == len(sizes) - 1 else 10
        run = replace(RUN_2, zero_stage=(2, 1, 3)[i])
        first = processes.run(work, without_dropout(), data, tmp_path, run, stop_at, world_size=world_size)[0]
        assert first["step"] == (stop_at * (i + 1) if stop_at else 40)
        losses += [values["loss"] for _, values in first["logged"]]
    output, expected = never_moved
    apart = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"T3: processes 2 -> {' -> '.join(map(str, sizes))}: losses within {apart:.1e} of the run's that stays")
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 40
    whole, moved = (load_file(home / step_name(40) / "ema.safetensors") for home in (output, tmp_path))
    assert max((whole[name] - moved[name]).abs().max().item() for name in whole) < 1e-3
    # The twin: the comparison sees what one step less would have been.
    assert losses[1:] != pytest.approx(expected[:-1], rel=1e-3)


def test_a_checkpoint_written_beside_the_next_steps_is_the_one_of_its_own(data: TrainData, tmp_path: Path) -> None:
    run = replace(RUN, checkpoint_every_steps=3, keep_checkpoints=9)
    two(settings(max_steps=6, warmup_steps=2), data, tmp_path / "beside", run)
    two(settings(max_steps=6, warmup_steps=2), data, tmp_path / "stopped", run, 3)
    assert weights_of(tmp_path / "beside", 3) == weights_of(tmp_path / "stopped", 3)


# ---- what is seen of it ------------------------------------------------------------------------------------
def test_numbers_grids_and_checkpoints_come_when_they_are_due(data: TrainData, tmp_path: Path) -> None:
    what = settings(
        max_steps=10, log_every_steps=2, grid=GRID, held_out_shards=1, validate_every_steps=5, validation_samples=16
    )
    run = replace(RUN, checkpoint_every_steps=3, keep_checkpoints=2, activation_checkpointing=True)
    first, second = two(what, data, tmp_path, run)
    assert second["logged"] == second["grids"] == []
    steps = [step for step, values in first["logged"] if "loss" in values]
    assert steps == [2, 4, 6, 8, 10]
    values = first["logged"][0][1]
    assert {"loss", "grad_norm", "grad_norm_max", "learning_rate", "samples_per_second", "input_wait", "memory_bytes",
            "outside_seconds", "checkpoint_seconds", "skipped_batches"} <= values.keys()  # fmt: skip
    assert values["samples_seen"] == 16
    assert {name for _, v in first["logged"] for name in v if name.startswith("loss_t")} == {
        f"loss_t{i}" for i in range(4)
    }
    assert all(math.isfinite(value) for _, v in first["logged"] for value in v.values())
    assert values["learning_rate"] == pytest.approx(what.training.learning_rate * 2 / 5)
    assert [step for step, v in first["logged"] if "validation_loss" in v] == [5, 10]
    assert [(step, name) for step, _, name in first["grids"]] == [(4, "samples"), (8, "samples"), (10, "samples")]
    assert Image.open(io.BytesIO(first["grids"][0][1])).size[0] > 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(9), step_name(10)]


def test_a_checkpoint_is_enough_to_build_the_model_again(data: TrainData, straight: tuple[Path, list[Any]]) -> None:
    output, _ = straight
    folder = output / step_name(40)
    config = json.loads((folder / "config.json").read_text())
    again = from_plain(TrainSettings, config["settings"])
    assert again == settings() and config["data"]["latent_shape"] == SHAPE
    denoiser = make_denoiser(again.unet, again.text_encoder)
    denoiser.load_state_dict(load_file(folder / "ema.safetensors"))
    # What is averaged lags behind; the text encoder goes with its newest weights.
    last = newest(output)
    assert last is not None
    for name, weight in denoiser.named_parameters():
        live = last.read("weight", name, 0, weight.numel()).view(weight.shape)
        assert torch.equal(weight.detach(), live) == name.startswith("text_encoder.") or weight.numel() < 9, name


def test_it_learns_four_pictures_by_heart(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    data = write_data(tmp_path / "latents", [4])
    what = settings(
        {"prediction": "z0"}, learning_rate=1e-2, caption_dropout=0.0, max_steps=80, log_every_steps=20, lr_end=1.0
    )
    what = replace(what, unet=replace(what.unet, dropout=0.0))
    (result,) = processes.run(work, what, data, tmp_path / "train", replace(RUN, micro_batch_size=8))
    losses = [values["loss"] for _, values in result["logged"]]
    assert losses[-1] < 0.7 * losses[0], losses


# ---- what stops it -----------------------------------------------------------------------------------------
def poisoned(folder: Path) -> TrainData:
    """One sample of 16 is infinite."""
    data = write_data(folder, [15])
    writer = ShardWriter(folder / "bad.tar", folder / "bad.index")
    moments = np.full((2 * SHAPE[0], *SHAPE[1:]), np.inf, np.float16)
    writer.write("000666000", {"moments.npy": encode_array(moments), "txt": b"bad"})
    writer.close()
    sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
    bad = ShardInfo(str(writer.tar), str(writer.index), samples=1, digest="bad", index_sha256=sha256)
    return replace(data, shards=[*data.shards, bad], used=[*data.used, None])


def test_a_loss_that_is_no_number_stops_all_and_names_step_process_and_keys(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    data = poisoned(tmp_path / "latents")
    run = replace(RUN, checkpoint_every_steps=1)
    errors = processes.run(work, settings(max_steps=10), data, tmp_path / "train", run, world_size=2)
    assert all(isinstance(error, RuntimeError) for error in errors) and str(errors[0]) == str(errors[1])
    message = str(errors[0])
    assert "the loss is not finite at step" in message and "000666000" in message
    assert message.count("  process ") == 1  # only the one that had it is named
    assert "this is batch 1 that is no good, and training.max_skipped_batches is 0" in message
    step = int(message.split("at step ")[1].split(";")[0])
    last = newest(tmp_path / "train")
    assert (last.step if last else 0) == step - 1
    if last:
        weights = load_file(last.path / "ema.safetensors").values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_a_batch_that_is_no_good_is_left_out_and_the_next_but_one_too_until_there_are_too_many(
    tmp_path: Path, stage: int
) -> None:
    """Of every two batches of eight one holds the infinite sample: after three of them it ends."""
    (tmp_path / "latents").mkdir()
    data, output = poisoned(tmp_path / "latents"), tmp_path / "train"
    run = replace(RUN, zero_stage=stage, checkpoint_every_steps=1, keep_checkpoints=100)
    what = settings(max_steps=20, max_skipped_batches=2, log_every_steps=1)
    results = processes.run(work, what, data, output, run, world_size=2)
    assert all("this is batch 3 that is no good" in str(error) and error.stops_the_run for error in results)
    notes = [json.loads(path.read_text()) for path in sorted((output / "skipped").iterdir())]
    assert [note["reason"] for note in notes] == ["the loss is not finite"] * 3
    assert all("000666000" in [key for keys in note["keys"].values() for key in keys] for note in notes)
    last = newest(output)
    assert last is not None
    assert last.manifest["skipped_batches"] == sum(note["step"] <= last.step for note in notes)
    # Every batch that was seen is either a step or was left out.
    assert last.step == notes[2]["step"] - 1 and notes[2]["samples_seen"] == 8 * (last.step + 3)
    for path in output.glob("step-*"):
        weights = load_file(path / "ema.safetensors").values()
        assert all(bool(weight.isfinite().all()) for weight in weights), path


def test_a_batch_left_out_changes_nothing_that_a_restart_would_not_find_again(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    data = poisoned(tmp_path / "latents")
    what = settings(max_steps=6, max_skipped_batches=100, log_every_steps=1)
    whole = two(what, data, tmp_path / "whole", RUN)
    assert [result["step"] for result in whole] == [6, 6]
    assert [step for step, _ in whole[0]["logged"]] == [1, 2, 3, 4, 5, 6]  # each step is told once
    two(what, data, tmp_path / "parts", RUN, 5)
    two(what, data, tmp_path / "parts", RUN)
    assert weights_of(tmp_path / "parts", 6) == weights_of(tmp_path / "whole", 6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda s, d: (replace(s, training=replace(s.training, learning_rate=1e-4)), d),
            "training.learning_rate: 0.003",
        ),
        (lambda s, d: (s, replace(d, selection="other")), "selection: 'selection 1' in the checkpoint, 'other' now"),
        (lambda s, d: (replace(s, unet=replace(s.unet, model_channels=16)), d), "unet.model_channels: 8"),
    ],
)
def test_a_run_does_not_go_on_from_other_settings(
    data: TrainData, straight: tuple[Path, list[Any]], change: Callable[..., Any], named: str
) -> None:
    what, other = change(settings(max_steps=50), data)
    (error,) = processes.run(work, what, other, straight[0], replace(RUN, micro_batch_size=8))
    assert isinstance(error, ValueError) and named in str(error) and "name=OTHER" in str(error)


def test_more_steps_go_on_and_none_are_done_again(data: TrainData, tmp_path: Path) -> None:
    what = settings(max_steps=6, lr_schedule="constant")
    run = replace(RUN, micro_batch_size=8)
    (first,) = processes.run(work, what, data, tmp_path, run)
    again, more = (
        processes.run(
            work, replace(what, training=replace(what.training, max_steps=n, log_every_steps=1)), data, tmp_path, run
        )[0]
        for n in (6, 8)
    )
    assert first["step"] == 6 and again == {"step": 6, "logged": [], "grids": []}
    assert more["step"] == 8 and [step for step, _ in more["logged"]] == [7, 8]


@pytest.mark.slow
def test_killed_while_saving_it_goes_on_to_the_same_bits(
    data: TrainData, straight: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """With the checkpoint of step 15 there, the one of step 30 is never committed and made again."""
    run = replace(RUN_2, checkpoint_every_steps=15)
    crash = {"LDM_CRASH_AT": "checkpoint_before_committed"}
    (tmp_path / "train").mkdir()
    shorter = settings(max_steps=40)
    assert [r["step"] for r in two(shorter, data, tmp_path / "train", RUN_2, 15)] == [15, 15]
    died = processes.run(work, shorter, data, tmp_path / "train", run, world_size=2, env=crash)
    assert 137 in died
    torn = tmp_path / "train" / step_name(30)
    assert checkpoint.problems(torn) == ["COMMITTED is missing"]
    rest = two(shorter, data, tmp_path / "train", run)
    assert [r["step"] for r in rest] == [40, 40] and rest[0]["logged"][0][0] == 20
    assert weights_of(tmp_path / "train", 40) == weights_of(straight[0], 40)


def test_settings_that_cannot_be_followed_are_refused_at_once(data: TrainData, tmp_path: Path) -> None:
    for what, message in (
        (settings(ema_of="text"), "ema_of is 'text'; there are: unet, all"),
        (settings(lr_schedule="step"), "lr_schedule is 'step'"),
        (settings(held_out_shards=1, validation_samples=12), "must be a multiple of training.batch_size, 8"),
        (settings({"prediction": "eps"}), "zero_terminal_snr"),
        (settings({"loss": "l1", "min_snr_gamma": 5.0}), "min_snr_gamma=5 weighs squared errors"),
    ):
        with pytest.raises(ValueError, match=message):
            work(what, data, tmp_path, RUN)
    assert asdict(settings())["training"]["seed"] == settings().training.seed


def with_peak(what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig, peak: float) -> list[Any]:
    logged: list[dict[str, float]] = []
    train(what, data, output, run, decode=lambda z0: z0, log=lambda step, values: logged.append(values),
          log_grid=lambda *a: None, should_stop=lambda: False, peak_flops=peak)  # fmt: skip
    return logged


def test_the_share_of_the_peak_follows_from_speed_and_arithmetic(data: TrainData, tmp_path: Path) -> None:
    what = settings(max_steps=4, warmup_steps=2, log_every_steps=2)
    logged, _ = processes.run(with_peak, what, data, tmp_path, RUN, 1e12, world_size=2)
    flop = costs_of(what, SHAPE).step_flop()
    assert len(logged) == 2 and flop > 1e5
    for values in logged:
        assert values["mfu"] == pytest.approx(values["samples_per_second"] * flop / 2e12)
