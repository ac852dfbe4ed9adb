"""Trains the autoencoder on the downloaded pictures, when none is given: autoencoder.weights=null.

download/000042.tar + filter_images/000042.parquet -> train_autoencoder/autoencoder.safetensors

A killed run goes on from its newest checkpoint, which lies in train_autoencoder/state until the weights are
committed. The record holds the figures, `scale_factor` among them: write it to autoencoder.scale_factor, which
`train` reads.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from ldm.images import decode_rgb, resize_and_crop
from ldm.training.train_autoencoder import train_autoencoder
from pipelines.dag import Job
from pipelines.journal import Journal, journal_path
from pipelines.manifest import Record, shard_name
from pipelines.stages.filter_images import pictures_of
from pipelines.training_set import input_digests

STATE = "state"


def run(job: Job) -> Record:
    """Trains on every kept picture and commits the weights."""
    network, training = job.what["autoencoder.network"], job.what["autoencoder_training"]
    images, captions = read_pictures(job, training.image_size)
    journal = Journal(journal_path(job.how.run, job.stage, "rank0"))
    state = job.output / STATE
    try:
        figures = train_autoencoder(
            network, training, images, captions, state, log=journal.metrics, should_stop=lambda: False
        )
    finally:
        journal.close()
    record = _commit(job, images, figures)
    shutil.rmtree(state)
    return record


def read_pictures(job: Job, size: int) -> tuple[np.ndarray, list[str]]:
    """The kept pictures of every committed shard in key order, (n, size, size, 3) uint8, and their captions."""
    images, captions = [], []
    for shard in sorted(job.inputs["filter_images"].committed()):
        name = shard_name(shard)
        table = pq.read_table(job.inputs["filter_images"].data(f"{name}.parquet"), columns=["key", "verdict"])
        kept = {row["key"] for row in table.to_pylist() if not row["verdict"]}
        for key, data, caption in pictures_of(job.inputs["download"].data(f"{name}.tar")) if kept else ():
            if key in kept:
                images.append(resize_and_crop(decode_rgb(data), size))
                captions.append(caption.decode())
    if not images:
        raise ValueError(f"filter_images kept no picture in {job.inputs['filter_images'].path}; expected some")
    return np.stack(images), captions


def _commit(job: Job, images: np.ndarray, figures: dict[str, float]) -> Record:
    facts: dict[str, Any] = {name: round(value, 6) for name, value in figures.items()}
    facts |= {"torch": torch.__version__}
    with job.output.attempt(None, job.fingerprint) as attempt:
        shutil.copyfile(job.output / STATE / "weights.safetensors", attempt.path / "autoencoder.safetensors")
        return attempt.commit(
            rows=len(images),
            samples=int(figures["trained_pictures"]),
            dropped={
                "held_out": int(figures["held_out_pictures"]),
                "like_held_out": int(figures["near_pictures"]),
            },
            inputs=input_digests(job.inputs),
            facts=facts,
        )
