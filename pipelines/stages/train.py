"""Decides which samples are used, then trains on them: one worker for each GPU, started by Ray Train.

precompute_latents + selection -> train/step-00001000/, train/selection.parquet, train/grids/, train/record.json

This file is all that stands between the cluster and ldm.training.train, which sees torch.distributed and three
functions. Ray Train is never handed a checkpoint: a restarted worker finds the newest committed one itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.config import AutoencoderSettings
from pipelines import cluster, rewind, stopping
from pipelines.dag import Job, weights_path
from pipelines.journal import Journal, journal_path
from pipelines.manifest import (
    Record,
    StageFolder,
    canonical,
    edition_digest,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
    write_whole,
)
from pipelines.selection import (
    REASONS,
    SELECTION,
    Chosen,
    all_samples,
    columns_read,
    read_selection,
    reasons_file,
    select,
    write_selection,
)
from pipelines.settings import SelectionConfig
from pipelines.training_set import (
    Cache,
    autoencoder_settings,
    bucket_shapes_of,
    cached_context,
    caches_of,
    check_caches,
    closed_records,
    held_out_shards,
    input_digests,
    shard_infos,
    used_bits,
)

if TYPE_CHECKING:
    from ldm.training.loader import TrainData

SELECTED = "selected.json"  # what the selection was decided from, and its figures
STOP = "stop"  # a file of this name in the stage's folder asks all workers to save and leave


@dataclass(frozen=True)
class Prepared:
    """What was decided before training starts."""

    selections: dict[str, str]  # cache -> digest
    known: int  # samples there are
    used: int  # samples trained on
    reasons: dict[str, int]  # of those that are not


def run(job: Job) -> Record:
    """Runs on the driver: selection, training, record."""
    prepared = prepare(job)
    stopping.warn_of_short_grace()
    with stopping.asking((job.output / STOP).touch, "training saves and leaves"), _stacks_named(job):
        arguments = {"job": job, "selections": prepared.selections}
        cluster.launch_training(work, arguments, job.how.cluster.train, job.output.path / ".ray")
    return commit(job, prepared)


def prepare(job: Job) -> Prepared:
    """Decides which samples are used, goes back where that is asked for, and forgets that a run was asked to stop."""
    from ldm.training.copies import place_of

    caches = caches_of(job)
    records = {cache.name: closed_records(cache.latents) for cache in caches}
    check_caches(caches, records, job)
    prepared = _selected(job, caches, records)
    copies = place_of(job.how.cluster.train.run, job.output.path)
    rewind.go_back(job.output.path, job.what["training"], rank_journal(job), copies)
    (job.output / STOP).unlink(missing_ok=True)
    return prepared


def _selected(job: Job, caches: list[Cache], records: dict[str, dict[int, Record]]) -> Prepared:
    """Decides which samples are used. What was decided of the same samples by the same rules is taken as it lies."""
    held = held_out_shards(caches, records, job.what["training"].held_out_shards)
    made_of = _made_of(job, held)
    if (kept := _kept_selection(job, made_of)) is not None:
        return kept
    chosen = _select(job, caches, records, held)
    masks, whys = chosen.masks(), chosen.whys()
    selections = {
        cache.name: _place_selection(job, cache, {shard: masks[cache.name, shard] for shard in records[cache.name]})
        for cache in caches
    }
    own = {shard: why for (cache, shard), why in whys.items() if not cache}
    write_whole(job.output / REASONS, reasons_file(chosen.reasons, own))
    used, known = sum(int(mask.sum()) for mask in masks.values()), sum(len(mask) for mask in masks.values())
    prepared = Prepared(selections, known, used, dict(chosen.counts()))
    files = {name: sha256_file(job.output / name) for name in (*(cache.selection for cache in caches), REASONS)}
    write_json(job.output / SELECTED, {"format": 1, "made_of": made_of, "files": files, **asdict(prepared)})
    return prepared


def _made_of(job: Job, held: set[tuple[str, int]]) -> str:
    """Identity of all that a selection is decided from."""
    settings: SelectionConfig = job.what["dataset.selection"]
    removed = sha256_file(weights_path(settings.removed)) if settings.removed else None
    decided_by = {"version": SELECTION, "rules": {**asdict(settings), "removed": removed}, "held_out": sorted(held),
                  "inputs": input_digests(job.inputs)}  # fmt: skip
    return sha256_bytes(canonical(decided_by))


def _kept_selection(job: Job, made_of: str) -> Prepared | None:
    """What was decided before, where it was decided from the same and its files are as they were written."""
    if not (job.output / SELECTED).exists():
        return None
    kept = read_json(job.output / SELECTED)
    places = {job.output / name: sha256 for name, sha256 in kept["files"].items()}
    if kept["made_of"] != made_of or any(not p.is_file() or sha256_file(p) != sha256 for p, sha256 in places.items()):
        return None
    return Prepared(kept["selections"], kept["known"], kept["used"], kept["reasons"])


def _select(
    job: Job, caches: list[Cache], records: dict[str, dict[int, Record]], held: set[tuple[str, int]]
) -> Chosen:
    settings: SelectionConfig = job.what["dataset.selection"]
    columns = columns_read(settings, bool(held))
    known_of = (
        ((cache.name, shard), table) for cache in caches
        for shard, table in all_samples(cache.metadata, cache.images, sorted(records[cache.name]), columns)
    )  # fmt: skip
    with job.output.attempt(None, job.fingerprint) as scratch:
        return select(known_of, settings, job.how.cluster.filter_metadata, scratch.path, held)


@contextmanager
def _stacks_named(job: Job) -> Iterator[None]:
    """Says where processes that stood still left their stacks, whether or not training went on without them."""
    before = _stacks(job)
    try:
        yield
    finally:
        if new := sorted(_stacks(job) - before):
            limit = job.how.cluster.train.run.hang_seconds
            print(f"training stood still for {limit:g} s; what each process was doing: {', '.join(map(str, new))}")


def _stacks(job: Job) -> set[Path]:
    return {path for path in (job.output / "stacks").glob("rank-*.txt") if path.stat().st_size}


def _place_selection(job: Job, cache: Cache, masks: dict[int, np.ndarray]) -> str:
    """Writes train/selection.parquet and returns its digest. A run that goes on must find the same one."""
    with job.output.attempt(None, job.fingerprint) as attempt:
        path = attempt.path / cache.selection
        digest, place = write_selection(path, masks), job.output / cache.selection
        if place.exists() and sha256_file(place) != digest:
            raise ValueError(
                f"{place} was made from other samples or rules than there are now; start a new run with name=OTHER, "
                f"or +stage=train overwrite=true"
            )
        write_whole(place, path.read_bytes())
    return digest


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

    used, sets = job.what["autoencoder"], []
    for cache in caches_of(job):
        selection, latents = job.output / cache.selection, cache.latents
        data = cache_data(latents, closed_records(latents), used, selection, selections[cache.name])
        sets.append(replace(data, context_shape=cached_context(latents, job)))
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


def work(arguments: dict[str, Any]) -> None:
    """Runs in every training worker: hands ldm.training.train its settings, its data and its three functions."""
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
    training = replace(what["training"], start_from=start and str(weights_path(start)))
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
        log_checkpoint=lambda kept, removed: journal_checkpoints(journal, kept, removed),
        tell=lambda subject, words: journal.tags({subject: words}),
        should_stop=lambda: (job.output / STOP).exists(),
        peak_flops=gpu and gpu.peak_flops,
    )  # fmt: skip
    journal.close()


def decoder(job: Job) -> Any:
    """z0 (b, c, h, w) scaled -> image (b, 3, H, W) in [-1, 1], for sample grids.

    The autoencoder is loaded for the first of them: most processes draw none.
    """
    import torch

    from ldm.models.autoencoder import load_autoencoder

    settings = autoencoder_settings(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = lru_cache(lambda: load_autoencoder(settings, device))
    return lambda z0: autoencoder().decode(z0.to(device) / settings.scale_factor).clamp(-1, 1)


def journal_checkpoints(journal: Journal, kept: Path, removed: list[str]) -> None:
    """Tells of a checkpoint by its manifest's hash, which COMMITTED holds, and of those that had to go for it."""
    run = kept.parent.parent.name
    journal.model(f"{run}-{kept.name}", kept, (kept / "COMMITTED").read_text(), _step(kept.name))
    for name in removed:
        journal.model_removed(f"{run}-{name}", _step(name))


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def rank_journal(job: Job) -> Journal:
    """Where rank 0 says what it has to say; the driver carries it to MLflow."""
    return Journal(journal_path(Path(job.how.run), job.stage, "rank0"))
