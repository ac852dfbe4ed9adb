"""What a model was trained on: the cached latents that the selection of `train` lets through, and their autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ldm.config import AutoencoderSettings
from ldm.shards import ShardInfo, ShardReader
from pipelines.dag import Job, weights_path
from pipelines.manifest import Record, StageFolder, edition_digest
from pipelines.selection import read_selection


@dataclass(frozen=True)
class Sample:
    key: str
    caption: str
    fields: dict[str, bytes]  # as the shard holds it: "moments.npy" or "latent.npy", "txt"


def training_set(latents: StageFolder, train: StageFolder) -> Iterator[Sample]:
    """The samples trained on, in key order: those of `precompute_latents` whose bit in train's selection is set."""
    masks = read_selection(train / "selection.parquet")
    for shard, record in closed_records(latents).items():
        if shard > max(masks, default=-1):
            continue  # it came with a later edition than the one that was trained on
        reader = ShardReader(shard_info(latents, record))
        if len(masks.get(shard, ())) != len(reader):
            raise ValueError(
                f"{train / 'selection.parquet'} has {len(masks.get(shard, ()))} bits for shard {shard}, which holds "
                f"{len(reader)} samples; train again with: python -m pipelines.run +stage=train overwrite=true"
            )
        for i, key in enumerate(reader.keys()):
            if masks[shard][i]:
                fields = reader.read(i)
                yield Sample(key, fields["txt"].decode(), fields)
        reader.close()


def closed_records(latents: StageFolder) -> dict[int, Record]:
    """The records of a closed stage. Raises when it is open, or when they are not those that its manifest lists."""
    manifest = latents.manifest()
    if manifest is None:
        raise FileNotFoundError(f"{latents.path} is not closed; run +stage={latents.stage} first")
    committed = latents.committed()
    records = {row["shard"]: committed[row["shard"]] for row in manifest["shards"] if row["shard"] in committed}
    found, listed = edition_digest([record.digest for record in records.values()]), manifest["digest"]
    if found != listed:
        raise ValueError(
            f"{latents.path} holds {len(records)} shards with digest {found[:12]}, expected the "
            f"{len(manifest['shards'])} shards of its manifest with {listed[:12]}; find out which with: "
            f"python -m pipelines.verify path={latents.path}"
        )
    return records


def samples_of(train: StageFolder) -> int:
    """How many samples were trained on."""
    return sum(int(mask.sum()) for mask in read_selection(train / "selection.parquet").values())


def shard_info(latents: StageFolder, record: Record) -> ShardInfo:
    """Where a latent shard lies: its record names one tar and one index."""
    tar, index = (next(name for name in record.files if name.endswith(end)) for end in (".tar", ".index"))
    sha256 = record.files[index]["sha256"]
    return ShardInfo(str(latents / tar), str(latents / index), record.samples, record.digest, sha256)


def autoencoder_settings(job: Job) -> AutoencoderSettings:
    """The autoencoder of the latents; its weights are given, or made by train_autoencoder."""
    given: AutoencoderSettings = job.what["autoencoder"]
    if given.weights is not None:
        return replace(given, weights=str(weights_path(given.weights)))
    return replace(given, weights=str(job.inputs["train_autoencoder"] / "autoencoder.safetensors"))


def latent_field(autoencoder: AutoencoderSettings) -> str:
    """The member of a cached sample that holds its latent."""
    return "moments.npy" if autoencoder.network.posterior == "kl" else "latent.npy"


def input_digests(inputs: dict[str, StageFolder]) -> dict[str, str]:
    """What a stage that makes one result writes into its record: the digest of all that it read.

    Of what has editions, a stage that comes after `train` has read the one that `train` was made from.
    """
    train = inputs["train"].record() if "train" in inputs else None
    pinned = train.inputs if train else {}
    return {name: pinned.get(name) or _digest(folder) for name, folder in inputs.items()}


def _digest(folder: StageFolder) -> str:
    record = folder.record()
    if record is not None:
        return record.digest
    manifest: dict[str, Any] | None = folder.manifest()
    if manifest is None:
        raise FileNotFoundError(f"{folder.path} is not finished; python -m pipelines.run +stage={folder.stage} does it")
    return manifest["digest"]
