"""Decides which samples are used, then trains on them: one worker for each GPU, started by Ray Train.

precompute_latents + selection -> train/step-00001000/, train/selection.parquet, train/grids/, train/record.json

This file is all that stands between the cluster and ldm.training.train, which sees torch.distributed and three
functions. Ray Train is never handed a checkpoint: a restarted worker finds the newest committed one itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import AutoencoderSettings
from pipelines import cluster, launching, rewind, stopping
from pipelines.dag import ROOT, Job
from pipelines.devices import device_of
from pipelines.journal import Journal, journal_path, read_entries
from pipelines.manifest import Record, StageFolder, edition_digest, read_json, sha256_file, write_whole
from pipelines.selecting.decided import Prepared, decide
from pipelines.selection import read_selection
from pipelines.training_set import (
    autoencoder_settings,
    bucket_shapes_of,
    cached_context,
    caches_of,
    check_caches,
    closed_records,
    input_digests,
    shard_infos,
    used_bits,
)

if TYPE_CHECKING:
    from ldm.training.loader import TrainData

STOP = "stop"  # a file of this name in the stage's folder asks all workers to save and leave


def run(job: Job) -> Record:
    """Runs on the driver: selection, training, record."""
    cluster.check_room(job.how.cluster)
    prepared = prepare(job)
    stopping.warn_of_short_grace()
    stop = job.output / STOP
    with stopping.asking(stop.touch, "training saves and leaves"):
        launching.launch(work, {"job": job, "selections": prepared.selections}, job, stop)
    return commit(job, prepared)


def prepare(job: Job) -> Prepared:
    """Decides which samples are used, goes back where that is asked for, and forgets that a run was asked to stop."""
    from ldm.training.copies import check_place, place_of

    check_place(job.how.cluster.train.run, job.output.path)
    caches = caches_of(job)
    records = {cache.name: closed_records(cache.latents) for cache in caches}
    check_caches(caches, records, job)
    prepared = decide(job, caches, records)
    copies = place_of(job.how.cluster.train.run, job.output.path)
    rewind.go_back(job.output.path, job.what["training"], rank_journal(job), copies)
    (job.output / STOP).unlink(missing_ok=True)
    return prepared


def commit(job: Job, prepared: Prepared) -> Record:
    """The record of the stage: the last checkpoint's averaged weights are what later stages read."""
    from ldm.training.checkpoint import newest

    last = newest(job.output.path)
    wanted = job.what["training"].max_steps
    if last is None or last.step < wanted:
        at = "no step" if last is None else f"step {last.step}"
        raise RuntimeError(f"training stopped at {at} of {wanted}; the same command goes on from there")
    files = {}
    weights = [last.path / name for name in ("ema.safetensors", "config.json")]
    for path in [*weights, *(job.output / cache.selection for cache in caches_of(job))]:
        name = str(path.relative_to(job.output.path))
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    with job.output.attempt(None, job.fingerprint) as attempt:
        return attempt.commit(rows=prepared.known, samples=prepared.used, dropped=prepared.reasons,
                              inputs=input_digests(job.inputs), facts={"training.max_steps": last.step}, keep=files)


def train_data(job: Job, selections: dict[str, str]) -> TrainData:
    """What ldm.training needs to know of the latents: this run's own, mixed with others by weight if there are any."""
    from ldm.training.loader import mix

    used, sets, made_by = job.what["autoencoder"], [], autoencoder_settings(job)
    described = {"settings": asdict(replace(made_by, weights=None)), "sha256": sha256_file(made_by.weights)}
    for cache in caches_of(job):
        selection, latents = job.output / cache.selection, cache.latents
        data = cache_data(latents, closed_records(latents), used, selection, selections[cache.name])
        sets.append(replace(data, context_shape=cached_context(latents, job), autoencoder=described))
    return mix(sets, [1.0, *job.what["dataset.mixture"].values()]) if len(sets) > 1 else sets[0]


def cache_data(
    latents: StageFolder, records: dict[int, Record], autoencoder: AutoencoderSettings, selection: Path, digest: str
) -> TrainData:
    """The same of the latents in these records; a file of this digest says which of them are used."""
    from ldm.training.loader import TrainData

    masks, network = read_selection(selection), autoencoder.network
    infos, used = [], []
    for shard, record in records.items():
        tars = shard_infos(latents, record)
        infos += tars
        used += used_bits(tars, masks[shard], latents.cache)
    side = {record.facts["latent_side"] for record in records.values() if record.samples}
    return TrainData(
        shards=infos,
        used=used,
        edition=edition_digest([record.digest for record in records.values()]),
        selection=digest,
        field="moments.npy" if network.posterior == "kl" else "latent.npy",
        latent_shape=[network.latent_channels, *(2 * [side.pop()])],
        scale_factor=autoencoder.scale_factor,
        shapes=bucket_shapes_of(infos, network),
        node_cache=latents.cache,
    )


def work(arguments: dict[str, Any], should_leave: Callable[[], bool] = lambda: False) -> None:
    """Runs in every training worker: hands ldm.training.train its settings, its data and its three functions.

    Once one process should leave, all save and leave.
    """
    import torch

    from ldm.config import TrainSettings
    from ldm.training.train import train

    job: Job = arguments["job"]
    if not (job.output / "plan.json").exists():
        raise FileNotFoundError(
            f"{job.output / 'plan.json'}, written by the driver, is not to be seen on this node: paths.outputs must "
            f"be a folder that all nodes share"
        )
    torch.set_num_threads(job.how.cluster.train.run.threads)
    data = train_data(job, arguments["selections"])
    what = job.what
    start = what["training"].start_from
    training = replace(what["training"], start_from=start and str(ROOT / start))
    settings = TrainSettings(
        training=training, diffusion=what["diffusion"], unet=what["unet"], text_encoder=what["text_encoder"]
    )
    journal, gpu = rank_journal(job), job.how.cluster.train.gpu

    def log_grid(step: int, png: bytes, name: str) -> None:
        path = job.output / f"grids/{name}-{step:08d}.png"
        write_whole(path, png)
        journal.image(name, path, step)

    train(
        settings, data, job.output.path, job.how.cluster.train.run,
        decode=decoder(job),
        log=lambda step, values: journal.metrics(values, step=step),
        log_grid=log_grid,
        log_checkpoints=teller_of_checkpoints(journal, job.output.path),
        tell=lambda subject, words: journal.tags({subject: words}),
        should_stop=lambda: should_leave() or (job.output / STOP).exists(),
        peak_flops=gpu and gpu.peak_flops,
    )  # fmt: skip
    journal.close()


def decoder(job: Job) -> Any:
    """z0 (b, c, h, w) scaled -> image (b, 3, H, W) in [-1, 1], for sample grids.

    The autoencoder is loaded for the first of them: most processes draw none.
    """
    from ldm.models.autoencoder import load_autoencoder

    settings = autoencoder_settings(job)
    device = device_of(job.how.cluster.train.num_gpus, "train")
    autoencoder = lru_cache(lambda: load_autoencoder(settings, device))
    return lambda z0: autoencoder().decode(z0.to(device) / settings.scale_factor).clamp(-1, 1)


def teller_of_checkpoints(journal: Journal, home: Path) -> Callable[[], None]:
    """Tells of checkpoints that were not told of, by their manifest's hash, which COMMITTED holds, with their
    validation loss, and of those that are gone.

    What was told is read from the journal itself: whoever is killed between a checkpoint and its line, or between a
    removal and its line, is made good by the next start.
    """
    from ldm.training.keeping import measured

    run = home.parent.name
    known = lru_cache(lambda: told_checkpoints(journal.path))  # read by the process that tells: the others never do

    def tell() -> None:
        told = known()
        here = {path.parent: path.read_text() for path in sorted(home.glob("step-*[0-9]/COMMITTED"))}
        for path, sha256 in here.items():
            if told.get(path.name) != sha256:
                loss = measured(read_json(path / "manifest.json"))
                values = {} if loss is None else {"validation_loss": loss[1]}
                journal.model(f"{run}-{path.name}", path, sha256, _step(path.name), values)
                told[path.name] = sha256
        for name in sorted(told.keys() - {path.name for path in here}):
            journal.model_removed(f"{run}-{name}", _step(name))
            del told[name]

    return tell


def told_checkpoints(path: Path) -> dict[str, str]:
    """The checkpoints that a journal knows of and that are not gone by what it says, with their hashes."""
    told: dict[str, str] = {}
    for entry in read_entries(path)[0]:
        if entry["kind"] == "rewind":
            told = {name: sha256 for name, sha256 in told.items() if _step(name) <= entry["step"]}
        elif entry["kind"] in ("model", "model_removed"):
            name = "step-" + entry["name"].rpartition("step-")[2]
            told.pop(name, None)
            if entry["kind"] == "model":
                told[name] = entry["sha256"]
    return told


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def rank_journal(job: Job) -> Journal:
    """Where rank 0 says what it has to say; the driver carries it to MLflow."""
    return Journal(journal_path(Path(job.how.run), job.stage, "rank0"))
