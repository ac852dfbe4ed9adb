"""What a model was trained on: the cached latents that the selection of `train` lets through, and their autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config import AutoencoderConfig, AutoencoderSettings
from ldm.node_cache import NodeCache
from ldm.shards import ShardInfo, open_shard, read_index
from ldm.training.order import held_out
from pipelines.dag import Job, weights_path
from pipelines.manifest import Record, StageFolder, edition_digest, sha256_file
from pipelines.selection import read_selection

# Where the standard deviation of scaled latents may lie. Drawings and photographs differ by a third or so; a factor
# that belongs to another autoencoder, or none at all, is further off.
SCALED_STD = 0.4, 2.5
WAY = "name=OTHER makes a new run with its own latents; the old values read these"


@dataclass(frozen=True)
class Cache:
    """Latents that are trained on, with what the selection asks about them."""

    name: str  # "", or "@photos" where they are those of another run that dataset.mixture names
    metadata: StageFolder
    images: StageFolder
    latents: StageFolder

    @property
    def selection(self) -> str:
        """The file in the stage's folder that says which samples of them are used."""
        return f"selection{self.name}.parquet"


def caches_of(job: Job) -> list[Cache]:
    """This run's own latents, then those that are mixed in."""
    names = ["", *(f"@{name}" for name in job.what["dataset.mixture"])]
    stages = ("filter_metadata", "filter_images", "precompute_latents")
    return [Cache(name, *(job.inputs[f"{stage}{name}"] for stage in stages)) for name in names]


@dataclass(frozen=True)
class Sample:
    key: str
    caption: str
    fields: dict[str, bytes]  # as the shard holds it: "moments.npy" or "latent.npy", "txt"


def trained_on(inputs: dict[str, StageFolder]) -> Iterator[tuple[str, Sample]]:
    """(run, sample) of all samples trained on: this run's own, "", then those of each run mixed in, by name."""
    for of in runs_read(inputs):
        latents = inputs[f"precompute_latents{of}"]
        yield from ((of.removeprefix("@"), sample) for sample in training_set(latents, inputs["train"], of))


def runs_read(inputs: dict[str, StageFolder]) -> list[str]:
    """Whose latents are read: "" is this run, "@photos" another one that dataset.mixture names."""
    return sorted(name.removeprefix("precompute_latents") for name in inputs if name.startswith("precompute_latents"))


def training_set(latents: StageFolder, train: StageFolder, of: str = "") -> Iterator[Sample]:
    """The samples trained on, in key order: those of `precompute_latents` whose bit in train's selection is set.

    They are this run's own, or those of another run that was mixed in, "@photos".
    """
    path = train / f"selection{of}.parquet"
    masks = read_selection(path)
    for shard, record in closed_records(latents).items():
        if shard > max(masks, default=-1):
            continue  # it came with a later edition than the one that was trained on
        readers = [open_shard(info, latents.cache) for info in shard_infos(latents, record)]
        places = sorted((key, which, i) for which, reader in enumerate(readers) for i, key in enumerate(reader.keys()))
        if len(masks.get(shard, ())) != len(places):
            raise ValueError(
                f"{path} has {len(masks.get(shard, ()))} bits for shard {shard}, which holds "
                f"{len(places)} samples; train again with: python -m pipelines.run +stage=train overwrite=true"
            )
        for used, (key, which, i) in zip(masks[shard], places, strict=True):
            if used:
                _, fields = readers[which].read(i)
                yield Sample(key, fields["txt"].decode(), fields)
        for reader in readers:
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


def samples_of(inputs: dict[str, StageFolder]) -> int:
    """How many samples were trained on, those that were mixed in among them."""
    paths = [inputs["train"] / f"selection{of}.parquet" for of in runs_read(inputs)]
    return sum(int(mask.sum()) for path in paths for mask in read_selection(path).values())


def shard_infos(latents: StageFolder, record: Record) -> list[ShardInfo]:
    """Where those latents of a shard lie that are trained on: a tar of squares, or one for each shape, or none."""
    counts, resolution = record.facts.get("folders", {}), record.facts.get("resolution")
    infos = []
    for tar in sorted(name for name in record.files if name.endswith(".tar")):
        folder, index = tar.rpartition("/")[0], tar.removesuffix(".tar") + ".index"
        samples, sha256 = counts.get(folder, record.samples), record.files[index]["sha256"]
        if samples and (resolution is None or folder.partition("/")[0] == str(resolution)):
            stored = tuple(file for name in (tar, index) if (file := latents.stored(name, record)))
            places = str(latents / tar), str(latents / index)
            infos.append(ShardInfo(*places, samples, record.digest, sha256, stored))
    return infos


def held_out_shards(caches: list[Cache], records: dict[str, dict[int, Record]], count: int) -> set[tuple[str, int]]:
    """(cache, shard) of those that ldm.training.loader.hold_out will hold out, from the records of each cache."""
    digests = {(cache.name, shard): record.digest for cache in caches for shard, record in records[cache.name].items()
               if shard_infos(cache.latents, record)}  # fmt: skip
    held = held_out(list(digests.values()), count)
    chosen = {place for place, digest in digests.items() if digest in held}
    if missing := {name for name, _ in digests} - {name for name, _ in digests.keys() - chosen}:
        names = ", ".join(sorted(name or "this run" for name in missing))
        raise ValueError(f"training.held_out_shards={count} leaves no shard of {names} to be trained on; lower it")
    return chosen


def shard_info(latents: StageFolder, record: Record) -> ShardInfo:
    """Where the latents of a shard of squares lie."""
    (info,) = shard_infos(latents, record)
    return info


def used_bits(infos: list[ShardInfo], mask: np.ndarray, cache: NodeCache | None = None) -> list[bytes]:
    """For each tar of a shard one bit for each of its samples, from a mask over all of them in key order."""
    if len(infos) == 1:
        return [np.packbits(mask).tobytes()]
    keys = [read_index(info, cache)["key"] for info in infos]
    everything = np.sort(np.concatenate(keys)) if keys else np.empty(0)
    return [np.packbits(mask[np.searchsorted(everything, part)]).tobytes() for part in keys]


def bucket_shapes_of(infos: list[ShardInfo], network: AutoencoderConfig) -> list[list[int]] | None:
    """c, h, w of each tar's latents, from the names of its folder, "192x320"; None when all of them are squares."""
    folders = [Path(info.tar).parent.name for info in infos]
    if not any("x" in folder for folder in folders):
        return None
    sides = [[int(side) // network.factor for side in folder.split("x")] for folder in folders]
    return [[network.latent_channels, *side] for side in sides]


def check_caches(caches: list[Cache], records: dict[str, dict[int, Record]], job: Job) -> None:
    """Refuses latents that cannot be trained on, or not together, before a worker starts."""
    sides: dict[int, StageFolder] = {}
    contexts = {}
    for cache in caches:
        check_cache(cache.latents, records[cache.name], job)
        contexts[cache.latents.path] = cached_context(cache.latents, job)
        for record in records[cache.name].values():
            sides.setdefault(record.facts["latent_side"], cache.latents)
    if len(sides) > 1:
        found = ", ".join(f"{side} in {latents.path}" for side, latents in sides.items())
        raise ValueError(f"latents that are mixed must be of one size; their sides are {found}; see dataset.mixture")
    if len(set(map(bool, contexts.values()))) > 1:
        found = ", ".join(f"{path}: {'yes' if context else 'no'}" for path, context in contexts.items())
        raise ValueError(
            f"caches that are mixed must all hold their captions' contexts, or none of them: {found} "
            f"(dataset.precompute_latents.text_features)"
        )


def check_cache(latents: StageFolder, records: dict[int, Record], job: Job) -> None:
    """Refuses latents that another autoencoder made, or of another size or scale than they are trained on as."""
    used: AutoencoderSettings = job.what["autoencoder"]
    plan = latents.read_plan() or {"what": {}}
    made, asked = plan["what"].get("autoencoder.network"), asdict(used.network)
    if made is not None and made != asked:
        raise ValueError(f"{latents.path} was made by the autoencoder {made}; asked for is {asked}; {WAY}")
    if (hashed := plan["what"].get("autoencoder.weights")) is not None and used.weights is not None:
        if (now := sha256_file(weights_path(used.weights))) != hashed:
            raise ValueError(
                f"{latents.path} was made with weights {hashed[:12]}; autoencoder.weights={used.weights} has "
                f"{now[:12]}; {WAY}"
            )
    noted = plan.get("noted", {}).get("autoencoder.scale_factor")  # absent from older plans
    if noted not in (None, used.scale_factor):
        raise ValueError(
            f"{latents.path} was made for autoencoder.scale_factor={noted}; asked for is {used.scale_factor}. Where "
            f'that is right nothing need be made again: write it into {latents / "plan.json"}, below "noted"'
        )
    made_by = {record.inputs.get("train_autoencoder") for record in records.values()}
    wanted = job.inputs["train_autoencoder"].record().digest if used.weights is None else None
    if wrong := made_by - {wanted}:
        found, asked = (f"train_autoencoder {each[:12]}" if each else "given weights" for each in (wrong.pop(), wanted))
        raise ValueError(f"{latents.path} was made by {found}; asked for is {asked}; {WAY}")
    sides = {record.facts["latent_side"] for record in records.values() if "latent_side" in record.facts}
    if len(sides) > 1:
        raise ValueError(f"{latents.path} has latents with sides {sorted(sides)}, expected one; {WAY}")
    check_scale(latents, records, used.scale_factor)


def cached_context(latents: StageFolder, job: Job) -> list[int] | None:
    """l, d of the captions' contexts that training reads from a cache; None where it encodes captions itself.

    Raises ValueError where another frozen text encoder made them than the one that is trained beside.
    """
    made = (latents.read_plan() or {"what": {}})["what"].get("text_encoder")
    if made is None or (text := job.what["text_encoder"]) is None or text.kind != "clip":
        return None
    asked = job.output.read_plan()["what"]["text_encoder"]
    if made != asked:
        changed = [name for name in asked if made.get(name) != asked[name]]
        found = ", ".join(f"{name} {made.get(name)}" for name in changed)
        raise ValueError(
            f"the captions of {latents.path} were encoded by a text encoder with {found}; asked for is "
            f"{', '.join(f'{name} {asked[name]}' for name in changed)}; {WAY}"
        )
    return [text.length, text.width]


def check_scale(latents: StageFolder, records: dict[int, Record], scale_factor: float) -> None:
    """Refuses a scale factor that leaves z0 far from a standard deviation of 1: one that belongs to other latents.

    It is a rough check; where the plan of the latents notes the factor, `check_cache` compares that.
    """
    known = [(record.samples, record.facts["std"], record.facts["mean"]) for record in records.values()
             if record.samples and "std" in record.facts]  # fmt: skip
    if not known:
        return
    samples, std, mean = (np.array(column, np.float64) for column in zip(*known, strict=True))
    center = np.average(mean, weights=samples)
    measured = float(np.sqrt(np.average(std**2 + mean**2, weights=samples) - center**2))
    low, high = SCALED_STD
    if not low <= scale_factor * measured <= high:
        raise ValueError(
            f"the latents of {latents.path} have a standard deviation of {measured:.4f}; autoencoder.scale_factor="
            f"{scale_factor} makes it {scale_factor * measured:.3f}, expected {low} to {high}; about "
            f"{1 / max(measured, 1e-9):.4f} fits these latents"
        )


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
