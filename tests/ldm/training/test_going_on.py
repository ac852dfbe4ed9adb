"""Going on otherwise than before: from an earlier checkpoint, without some samples, with accepted settings."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.config import (
    AutoencoderConfig,
    AutoencoderSettings,
    TinyConfig,
    TrainingConfig,
    TrainingRunConfig,
    TrainSettings,
    from_plain,
)
from ldm.generate import draw_latents, load_decoder, load_painter
from ldm.models.autoencoder import make_autoencoder
from ldm.models.denoiser import make_denoiser
from ldm.storage import sha256_file
from ldm.training import checks, lr, may_change, saving
from ldm.training import train as loop
from ldm.training.checkpoint import Checkpoint, newest, opened, step_name
from ldm.training.going_on import accepted_changes, after_skipped, check_skipped_samples, run_config, start_from
from ldm.training.grid import grid_config
from ldm.training.loader import Batch, TrainData
from ldm.training.mixture import MixedOrder
from pipelines.config import compose, options
from pipelines.dag import STAGES
from tests.ldm.training import processes
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data

ALONE = replace(RUN, micro_batch_size=8, checkpoint_every_steps=2, keep_checkpoints=9)
WHAT = settings(max_steps=6, warmup_steps=2, log_every_steps=1, lr_schedule="constant", lr_end=1.0)


def changed(**training: Any) -> TrainSettings:
    return replace(WHAT, training=replace(WHAT.training, **training))


def watched(what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig) -> list[int]:
    """The positions that one process of a run trained on."""
    positions: list[int] = []

    def seed_dropout(seed: int, batch: Batch, seeded: Any = loop.seed_dropout) -> None:
        positions.extend(batch.positions.tolist())
        seeded(seed, batch)

    loop.seed_dropout = seed_dropout
    work(what, data, output, run)
    return positions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 6])


@pytest.fixture(scope="module")
def six(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("six")
    (result,) = processes.run(work, WHAT, data, output, ALONE)
    assert result["step"] == 6
    return output


def copy(six: Path, output: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(six / step_name(step), output / step_name(step))
    return output


# ---- where a new run begins ---------------------------------------------------------------------------------
def test_what_a_run_began_with_is_read_and_verified_once(data: TrainData, six: Path, tmp_path: Path) -> None:
    """Once there is a checkpoint the source may be damaged or gone."""
    source = copy(six, tmp_path / "source", 6) / step_name(6) / "ema.safetensors"
    what, output = changed(start_from=str(source), max_steps=2), tmp_path / "train"
    bytes_there = source.read_bytes()
    source.write_bytes(bytes_there[:-1] + bytes([bytes_there[-1] ^ 1]))
    (error,) = processes.run(work, what, data, output, ALONE)
    assert isinstance(error, ValueError) and f"{source} does not have the sha256 that" in str(error)
    source.write_bytes(bytes_there)
    (begun,) = processes.run(work, what, data, output, ALONE)
    assert begun["step"] == 2 and weights_of(output, 2) != weights_of(six, 2)
    source.unlink()
    (more,) = processes.run(work, replace(what, training=replace(what.training, max_steps=4)), data, output, ALONE)
    assert more["step"] == 4
    (error,) = processes.run(work, what, data, tmp_path / "anew", ALONE)
    assert isinstance(error, FileNotFoundError) and "no such file, and no checkpoint to go on from" in str(error)


def test_weights_of_another_size_are_named_with_both_shapes(six: Path) -> None:
    wider = make_denoiser(replace(WHAT.unet, model_channels=16), WHAT.text_encoder)
    with pytest.raises(ValueError, match=r"is of another model: .* is \[.*\], where the model has \[.*\]"):
        start_from(wider, str(six / step_name(6) / "ema.safetensors"))


# ---- what another folder needs -------------------------------------------------------------------------------
AUTOENCODER = AutoencoderConfig(
    kind="tiny", posterior="kl", factor=8, latent_channels=2, compvis=None,
    tiny=TinyConfig(image_low=-1.0, latent_clamp=None, patch=8, encoder_widths=[8], encoder_blocks=[1],
                    decoder_widths=[8], decoder_blocks=[1], block_convs=2, lowest_norm=False),
)  # fmt: skip


def test_two_files_and_the_autoencoder_are_enough_for_pictures(data: TrainData, tmp_path: Path) -> None:
    """ema.safetensors and config.json, taken to an empty folder: no manifest, no settings, nothing else of the run."""
    torch.manual_seed(0)
    weights = tmp_path / "autoencoder.safetensors"
    save_file(make_autoencoder(AUTOENCODER).state_dict(), weights)
    described = asdict(AutoencoderSettings(AUTOENCODER, weights=None, scale_factor=0.5))
    known = replace(data, autoencoder={"settings": described, "sha256": sha256_file(weights)})
    processes.run(work, changed(max_steps=2), known, tmp_path / "train", ALONE)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("ema.safetensors", "config.json"):
        shutil.copyfile(tmp_path / "train" / step_name(2) / name, alone / name)
    cpu, drawn = torch.device("cpu"), []
    for folder in (tmp_path / "train" / step_name(2), alone):
        found = opened(folder)
        z0 = draw_latents(load_painter(found, cpu), ["0 1", "what"], grid_config(WHAT.training))
        drawn.append(load_decoder(found, weights, cpu)(z0))
    assert drawn[0].shape == (2, 3, 32, 32) and torch.equal(*drawn) and drawn[0].std() > 0
    # The twin: another autoencoder of the same shape would draw other pictures, and is refused.
    other = {name: x + 0.1 for name, x in load_file(weights).items()}
    save_file(other, weights)
    with pytest.raises(ValueError, match="the latents were made by weights with"):
        load_decoder(opened(alone), weights, cpu)
    config = json.loads((alone / "config.json").read_text())
    config["autoencoder"]["sha256"] = sha256_file(weights)
    (alone / "config.json").write_text(json.dumps(config))
    assert not torch.equal(load_decoder(opened(alone), weights, cpu)(z0), drawn[0])


# ---- the best --------------------------------------------------------------------------------------------------
def test_the_best_is_kept_only_where_it_is_measured() -> None:
    best = replace(ALONE, keep_best=True, checkpoint_every_steps=1000)
    measured = changed(held_out_shards=1, validate_every_steps=5000).training
    for every in (250, 1000, 5000):
        checks.check_best(replace(measured, validate_every_steps=every), best)
    for training, words in (
        (replace(measured, held_out_shards=0), "training.held_out_shards is 0"),
        (replace(measured, validate_every_steps=None), "training.validate_every_steps is None"),
        (replace(measured, validate_every_steps=1500), "on the same step, every 3000"),
    ):
        with pytest.raises(ValueError, match=words):
            checks.check_best(training, best)
        checks.check_best(training, replace(best, keep_best=False))


@pytest.mark.parametrize("name", [None, *options("experiment")])
def test_every_preset_that_keeps_the_best_measures_it(name: str | None) -> None:
    config = compose([] if name is None else [f"+experiment={name}"])
    checks.check_best(config.training, config.cluster.train.run)


# ---- every save is kept -------------------------------------------------------------------------------------
def slowly_saved(what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig) -> dict[str, Any]:
    """Steps are quicker than what a save has to write."""

    def save_file(*held: Any, save_file: Any = saving.save_file) -> None:
        time.sleep(0.3)
        save_file(*held)

    saving.save_file = save_file
    return work(what, data, output, run)


def test_a_save_that_is_due_while_another_is_written_drops_neither(data: TrainData, tmp_path: Path) -> None:
    run = replace(ALONE, checkpoint_every_steps=1)
    (result,) = processes.run(slowly_saved, WHAT, data, tmp_path, run)
    there = sorted(path.parent.name for path in tmp_path.glob("step-*/COMMITTED"))
    print(f"six saves, each due while the one before it is written: {len(there)} committed")
    assert result["step"] == 6 and there == [step_name(step) for step in range(1, 7)]


# ---- samples that are left out -----------------------------------------------------------------------------
def test_from_an_earlier_checkpoint_on_exactly_the_samples_named_are_left_out(
    data: TrainData, six: Path, tmp_path: Path
) -> None:
    """Step 2 has seen 16 samples; 24 to 36 are left out, so the four steps after it take 16 to 24, and 37 and more."""
    what, output = changed(skip_samples=[24, 37]), copy(six, tmp_path / "back", 2)
    ranks = processes.run(watched, what, data, output, replace(ALONE, micro_batch_size=2), world_size=2)
    assert sorted(ranks[0] + ranks[1]) == [*range(16, 24), *range(37, 61)]
    last = newest(output)
    assert last is not None and last.step == 6 and last.manifest["samples_seen"] == 61
    assert last.manifest["history"] == [{"step": 3, "skipped_samples": [24, 37]}]
    # It is the run that would have left them out from the start, to the bit, and not the one that saw them.
    straight = tmp_path / "straight"
    (first,) = processes.run(watched, what, data, straight, ALONE)
    (again,) = processes.run(watched, what, data, copy(straight, tmp_path / "again", 4), ALONE)
    assert first == [*range(24), *range(37, 61)] and again == [*range(45, 61)]
    assert weights_of(tmp_path / "again", 6) == weights_of(straight, 6) != weights_of(six, 6)


def test_samples_to_be_left_out_begin_where_a_batch_does(data: TrainData, six: Path, tmp_path: Path) -> None:
    output = copy(six, tmp_path, 2)
    (error,) = processes.run(work, changed(skip_samples=[20, 30]), data, output, ALONE)
    assert isinstance(error, ValueError) and "in the middle of a batch of 8" in str(error)
    assert "begin at 16 and 24" in str(error)
    for wrong in ([8], [8, 8], [-8, 8]):
        with pytest.raises(ValueError, match=r"skip_samples is \[.*\]; it is \[a, b\] with 0 <= a < b"):
            checks.check(changed(skip_samples=wrong))
    assert [after_skipped([8, 20], seen) for seen in (0, 8, 16, 20)] == [0, 20, 20, 20]


def test_where_a_batch_is_of_one_shape_samples_left_out_end_where_it_does(data: TrainData, tmp_path: Path) -> None:
    shaped, mixed = replace(data, shapes=[data.latent_shape] * 3), replace(data, caches=[0, 0, 1])
    training = changed(skip_samples=[16, 37]).training
    check_skipped_samples(training, data, 16, [], tmp_path)  # of one shape any end will do
    for other in (shaped, mixed):
        with pytest.raises(ValueError, match="skip_samples ends at 37; .* it may end at 32 or 40"):
            check_skipped_samples(training, other, 16, [], tmp_path)
        check_skipped_samples(replace(training, skip_samples=[16, 40]), other, 16, [], tmp_path)
    # What the check is for: behind 37 a batch would take samples of two batches of the order.
    counts, shapes = [9, 14, 6], [0, 1, 0]
    order = MixedOrder(counts, shapes, [0, 0, 0], [1.0], seed=0, digest="x", lanes=2, window_shards=2, batch_size=8)
    kinds = {end: len({shapes[order.locate(position)[0]] for position in range(end, end + 8)}) for end in range(96)}
    assert {kinds[end] for end in kinds if end % 8 == 0} == {1} and 2 in kinds.values()


def test_samples_that_were_trained_on_already_are_not_left_out_without_a_word(
    data: TrainData, six: Path, tmp_path: Path
) -> None:
    """Who forgot training.resume hears where to go back to."""
    training = changed(skip_samples=[24, 40]).training
    home = copy(six, tmp_path, 2, 4, 6)
    with pytest.raises(ValueError, match="begins at 24, and 48 samples were seen") as error:
        check_skipped_samples(training, data, 48, [], home)
    assert "training.resume=NAME goes back to one of: step-00000002 (16 samples)" in str(error.value)
    with pytest.raises(ValueError, match="no checkpoint is older"):
        check_skipped_samples(replace(training, skip_samples=[8, 40]), data, 48, [], home)
    # In the middle of them is too late as well; left out before, they are no matter any more.
    with pytest.raises(ValueError, match="cannot be left out any more"):
        check_skipped_samples(training, data, 32, [], home)
    check_skipped_samples(training, data, 64, [{"step": 3, "skipped_samples": [24, 40]}], home)
    check_skipped_samples(training, data, 24, [], home)


# ---- the one list -------------------------------------------------------------------------------------------
OTHER: dict[str, Any] = {"start_from": "other", "resume": "step-1", "skip_samples": [0, 8], "accept": ["training.seed"],
                         "validate_every_steps": 7, "gradient_clipping": 0.5, "lr_schedule": "inverse_sqrt",
                         "precision": "bf16", "ema_of": "all", "deterministic": True}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(TrainingConfig)])
def test_every_setting_of_training_is_free_or_refused_here_as_in_the_plan_of_the_stage(
    name: str, data: TrainData, tmp_path: Path
) -> None:
    now = getattr(WHAT.training, name)
    other = replace(now, steps=77) if name == "grid" else OTHER[name] if name in OTHER else now + 1
    what = changed(**{name: other})
    there = run_config(WHAT, data)
    last = Checkpoint(tmp_path / step_name(2), {"step": 2}, there)
    free = f"training.{name}" in may_change.FREE
    if free:
        assert accepted_changes(last, run_config(what, data), what, data) == []
    else:
        with pytest.raises(ValueError, match=f"training.{name}: ") as error:
            accepted_changes(last, run_config(what, data), what, data)
        way = f"training.accept=[training.{name}]"
        assert (way in str(error.value)) == (f"training.{name}" in may_change.ACCEPTABLE)
    stage = STAGES["train"]
    assert free == (f"training.{name}" in {*stage.grows, *stage.requests, *stage.how})
    print(f"training.{name}: {'free' if free else 'refused'} in a checkpoint and in the plan")


# ---- settings that were accepted ---------------------------------------------------------------------------
def test_a_changed_learning_rate_and_batch_size_go_on_when_they_are_accepted(
    data: TrainData, six: Path, tmp_path: Path
) -> None:
    output = copy(six, tmp_path, 2, 4)
    what = changed(learning_rate=1e-3, batch_size=16)
    (error,) = processes.run(work, what, data, output, ALONE)
    assert isinstance(error, ValueError)
    assert "training.accept=[training.batch_size,training.learning_rate]" in str(error)
    half = replace(what, training=replace(what.training, accept=["training.learning_rate"]))
    (error,) = processes.run(work, half, data, output, ALONE)
    assert "training.batch_size: 8 in the checkpoint, 16 now" in str(error) and "learning_rate: 0.003" not in str(error)
    both = replace(what, training=replace(what.training, accept=["training.learning_rate", "training.batch_size"]))
    (result,) = processes.run(work, both, data, output, ALONE)
    assert result["step"] == 6 and [values["learning_rate"] for _, values in result["logged"]] == [1e-3, 1e-3]
    last = newest(output)
    assert last is not None and last.manifest["samples_seen"] == 4 * 8 + 2 * 16
    assert last.manifest["history"] == [{"step": 4, "accepted": [
        "training.batch_size: 8 in the checkpoint, 16 now",
        "training.learning_rate: 0.003 in the checkpoint, 0.001 now"]}]  # fmt: skip
    # From then on these are the run's own settings.
    (more,) = processes.run(work, replace(what, training=replace(what.training, max_steps=7)), data, output, ALONE)
    assert more["step"] == 7


def test_another_model_or_other_data_cannot_be_accepted(data: TrainData, six: Path) -> None:
    with pytest.raises(ValueError, match=r"training.accept has \['unet.dropout'\]; a run that goes on may change: "):
        checks.check(changed(accept=["unet.dropout"]))
    other = replace(changed(learning_rate=1.0), unet=replace(WHAT.unet, dropout=0.5))
    (error,) = processes.run(work, other, data, six, ALONE)
    assert "unet.dropout: 0.1 in the checkpoint, 0.5 now" in str(error) and "training.accept=" not in str(error)
    shaped = replace(data, shapes=[data.latent_shape] * 3)
    accepted = changed(batch_size=16, accept=["training.batch_size"])
    (error,) = processes.run(work, accepted, shaped, six, ALONE)
    assert "training.batch_size cannot change while a run goes on with pictures of several shapes" in str(error)


def test_more_steps_of_a_schedule_that_falls_to_its_end_are_no_mere_continuation(
    data: TrainData, tmp_path: Path
) -> None:
    cosine = changed(lr_schedule="cosine", lr_end=0.1, max_steps=4)
    (first,) = processes.run(work, cosine, data, tmp_path, ALONE)
    assert first["step"] == 4
    more = replace(cosine, training=replace(cosine.training, max_steps=8))
    (error,) = processes.run(work, more, data, tmp_path, ALONE)
    rate = 3e-3 * lr.multiplier("cosine", 5, 2, 8, 0.1)
    assert f"learning rate of step 5 would be {rate:.3g}, where the old settings have 0.0003" in str(error)
    assert "training.accept=[training.max_steps] goes on" in str(error)
    accepted = replace(more, training=replace(more.training, accept=["training.max_steps"]))
    (result,) = processes.run(work, accepted, data, tmp_path, ALONE)
    assert [values["learning_rate"] for _, values in result["logged"]] == pytest.approx(
        [3e-3 * lr.multiplier("cosine", step, 2, 8, 0.1) for step in (5, 6, 7, 8)]
    )


def test_a_checkpoint_from_before_these_settings_is_read() -> None:
    known = asdict(WHAT)
    for name in ("accept", "resume", "skip_samples"):
        del known["training"][name]
    assert from_plain(TrainSettings, known) == WHAT
    del known["training"]["seed"]
    with pytest.raises(KeyError):
        from_plain(TrainSettings, known)
