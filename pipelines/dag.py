"""The stages, what each one reads and what decides it; and for a configuration, what is done and what is left to do.

    filter_metadata -> download -> filter_images -> precompute_latents -> train -> generate -> evaluate
                                            \\-> train_autoencoder (when the autoencoder is not given)

A stage is handed only the sections that it declares, so its fingerprint cannot lie about what decides it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ldm.storage import StorageError, check, is_remote, place
from ldm.training import may_change
from pipelines import rewind
from pipelines.bucket import stage_folder
from pipelines.config import Config, ConfigError, plain, section
from pipelines.manifest import (
    Record,
    StageFolder,
    StaleError,
    canonical,
    edition_digest,
    edition_digests,
    fingerprint,
    read_record,
    sha256_bytes,
    sha256_file,
    shard_name,
)
from pipelines.settings import ClusterConfig, TrackingConfig

ROOT = Path(__file__).resolve().parent.parent

# Settings that name a file: they count by content.
FILES = (
    "autoencoder.weights", "text_encoder.weights", "text_encoder.vocab_file", "dataset.filter_metadata.deny_lists.*",
    "dataset.selection.removed", "dataset.filter_images.clip.weights", "dataset.filter_images.heads.*.weights",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """How a stage runs, what it reads and what decides it.

    kind "table" makes shards from the whole set at once, "shards" makes shard n from shard n of what it reads,
    "whole" makes one result. `grows` names settings of which more extends a finished result instead of changing it,
    `requests` settings that say how to go on with an unfinished one, `how` settings that decide no byte: how fast it
    goes, when it gives up. None of these is part of the fingerprint.
    `noted` settings decide nothing either, but its plan names them, for who reads the results.
    A stage that is `many` keeps one folder for each fingerprint, so that other settings never meet a refusal.
    """

    kind: str
    reads: tuple[str, ...]
    settings: tuple[str, ...]
    version: int = 1  # raised by hand when the stage's output changes for equal settings
    grows: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    how: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    many: bool = False


STAGES = {
    "filter_metadata": Stage(
        "table", (), ("dataset.source", "dataset.sample_web", "dataset.filter_metadata"), version=2),
    "download": Stage(
        "shards", ("filter_metadata",), ("dataset.download",), version=3,
        how=("dataset.download.threads", "dataset.download.requests_per_second", "dataset.download.min_yield",
             "dataset.download.yield_after")),
    "filter_images": Stage(
        "shards", ("download",), ("dataset.filter_images",), version=2),
    "train_autoencoder": Stage(
        "whole", ("download", "filter_images"), ("autoencoder.network", "autoencoder_training"), version=2),
    "precompute_latents": Stage(
        "shards", ("download", "filter_images"),
        ("dataset.precompute_latents", "autoencoder.network", "autoencoder.weights"), version=2,
        noted=("autoencoder.scale_factor",)),
    "train": Stage(
        "whole", ("filter_metadata", "filter_images", "precompute_latents"),
        ("dataset.selection", "dataset.mixture", "autoencoder", "text_encoder", "unet", "diffusion", "training"),
        grows=may_change.GROWS, requests=may_change.REQUESTS, how=may_change.SHOWN),
    "generate": Stage(
        "whole", ("train", "precompute_latents"), ("generation", "autoencoder"), many=True),
    "evaluate": Stage(
        "whole", ("generate", "train", "precompute_latents"), ("evaluation", "autoencoder"), many=True),
}  # fmt: skip


@dataclass(frozen=True)
class How:
    """How a stage is run; nothing here may change a byte that it writes."""

    cluster: ClusterConfig
    tracking: TrackingConfig
    connect: str | None  # address and port that stand in for every host of the data set
    run: str  # folder of the run, absolute


@dataclass(frozen=True)
class Job:
    """One stage with everything that it may know."""

    stage: str
    what: dict[str, Any]  # dotted section -> its settings
    fingerprint: str
    output: StageFolder
    inputs: dict[str, StageFolder]
    how: How


@dataclass
class Status:
    """Where a stage stands."""

    job: Job
    done: bool = False
    todo: list[int] = field(default_factory=list)  # shards still to make, in order (kind "shards" only)
    records: dict[int, Record] = field(default_factory=dict)  # committed shards
    funnel: dict[str, Any] | None = None  # {rows, samples, dropped} once done
    digest: str | None = None  # identity of the closed output, in its newest edition
    editions: list[str] = field(default_factory=list)  # identities of all its editions, the first one first


def check_places(config: Config) -> None:
    """Raises ConfigError when results cannot lie where the settings say."""
    if is_remote(config.paths.outputs):
        raise ConfigError(
            f"paths.outputs={config.paths.outputs}: checkpoints, journals and reports need a folder that all nodes "
            f"share; shards may lie on an object store: paths.shards={config.paths.outputs}"
        )
    try:
        if config.paths.shards is not None:
            check(place(config.paths.shards), "paths.shards")
    except StorageError as error:
        raise ConfigError(str(error)) from error


def check_stage_name(name: str) -> None:
    """Raises ConfigError listing the stages when there is none of this name."""
    if name not in STAGES:
        raise ConfigError(f"no such stage: {name!r}; there are: {', '.join(STAGES)}")


def weights_path(weights: str) -> Path:
    """A file of weights, a vocabulary or a list; relative paths start at the project's folder."""
    path = Path(weights) if Path(weights).is_absolute() else ROOT / weights
    if not path.is_file():
        raise ConfigError(f"no file at {path} (given as {weights!r})")
    return path


def reads(config: Config, stage: str) -> tuple[str, ...]:
    """What a stage reads under this configuration: an autoencoder that is not given comes from its stage."""
    own = STAGES[stage].reads
    if config.autoencoder.weights is None and stage in ("precompute_latents", "train", "generate", "evaluate"):
        return (*own, "train_autoencoder")
    return own


def decides(config: Config, stage: str) -> tuple[str, ...]:
    """The sections that decide a stage under this configuration: of latents the text encoder too, where its features
    are cached."""
    own = STAGES[stage].settings
    if stage != "precompute_latents" or not config.dataset.precompute_latents.text_features:
        return own
    text = config.text_encoder
    if text is None or text.kind != "clip" or text.weights is None:
        found = "null" if text is None else f"of kind {text.kind!r}, with weights {text.weights}"
        raise ConfigError(
            f"dataset.precompute_latents.text_features is true and text_encoder is {found}; only what a frozen one of "
            f"kind 'clip' with given weights makes of captions can be cached: give one, or set text_features=false"
        )
    return (*own, "text_encoder")


def what_of(config: Config, stage: str) -> dict[str, Any]:
    """The settings that decide a stage, as plain values; files count by their content, never by their path."""
    sources = config.paths.sources
    what = {path: _by_content(plain(section(config, path)), path, sources) for path in decides(config, stage)}
    for path in STAGES[stage].grows + STAGES[stage].requests + STAGES[stage].how:
        head, _, leaf = path.rpartition(".")
        what[head] = {key: value for key, value in what[head].items() if key != leaf}
    return what


def _by_content(value: Any, path: str, sources: dict[str, str]) -> Any:
    """A section with every file in it replaced by the hash of what the file holds."""
    if isinstance(value, dict):
        return {key: _by_content(item, f"{path}.{key}", sources) for key, item in value.items()}
    if value is not None and any(fnmatch(path, pattern) for pattern in FILES):
        try:
            return sha256_file(weights_path(value))
        except ConfigError as error:
            source = f"; it comes from {sources[path]}" if path in sources else ""
            raise ConfigError(
                f"{path}: {error}{source}; put the file there, or name another one with {path}=FILE"
            ) from error
    return value


class Dag:
    """A configuration held against the disk: for each stage its job and its status."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.what = {name: self._what(name) for name in STAGES}
        self.fingerprints: dict[str, str] = {}
        for name, stage in STAGES.items():
            inputs = {read: self.fingerprints[read] for read in reads(config, name)}
            self.fingerprints[name] = fingerprint(name, stage.version, self.what[name], inputs)
        self.statuses: dict[str, Status] = {}

    @property
    def run_folder(self) -> Path:
        return Path(self.config.paths.outputs).absolute() / self.config.name

    def wanted(self) -> list[str]:
        """The stages that the configuration asks for, in order."""
        if self.config.stage:
            return [self.config.stage.name]
        return [name for name in STAGES if name != "train_autoencoder" or self.config.autoencoder.weights is None]

    def refresh(self, stage: str) -> Status:
        """Reads a stage's status, and that of all it reads, from the disk. Raises StaleError on what does not match."""
        for read in reads(self.config, stage):
            if read not in self.statuses:
                self.refresh(read)
        self.statuses[stage] = self._status(stage)
        return self.statuses[stage]

    def job(self, stage: str) -> Job:
        """The job of a stage, reading from the folders of the stages before it (in their current state)."""
        config = self.config
        return Job(
            stage=stage,
            what={path: section(config, path) for path in decides(self.config, stage)},
            fingerprint=self.fingerprints[stage],
            output=self._folder(stage),
            inputs={read: self.statuses[read].job.output for read in reads(config, stage)} | self._mixed(stage),
            how=How(config.cluster, config.tracking, config.dataset.connect, str(self.run_folder)),
        )

    def plan(self, stage: str) -> dict[str, Any]:
        """What plan.json holds: only what inputs decide."""
        return {
            "stage": stage,
            "version": STAGES[stage].version,
            "fingerprint": self.fingerprints[stage],
            "what": self.what[stage],
            "reads": {read: self.fingerprints[read] for read in reads(self.config, stage)},
            "noted": {path: section(self.config, path) for path in STAGES[stage].noted},
        }

    def _what(self, stage: str) -> dict[str, Any]:
        """What decides a stage; settings of `how` only where its plan is so old that it counts them, as it has them."""
        what, counted = what_of(self.config, stage), {}
        if STAGES[stage].how:
            with suppress(ValueError):  # a damaged plan is told of by whoever asks for the stage's status
                counted = (self._folder(stage).read_plan() or {}).get("what", {})
        for path in STAGES[stage].how:
            head, _, leaf = path.rpartition(".")
            if leaf in counted.get(head, {}):
                what[head][leaf] = counted[head][leaf]
        return what

    def planned(self, stage: str) -> list[int]:
        """The shards that a stage of kind "shards" shall make: those of what it reads, as far as they are known."""
        first = reads(self.config, stage)[0]
        if STAGES[first].kind == "shards":
            return self.planned(first)
        return sorted(self.statuses[first].records) if self.statuses[first].done else []

    def home(self, stage: str, run: str | None = None) -> Path:
        """Where a stage's results lie: in this run, in the run that paths.reuse names for it, or in another."""
        paths = self.config.paths
        where = paths.outputs if paths.shards is None or STAGES[stage].kind == "whole" else paths.shards
        root = place(where) if is_remote(where) else Path(where).absolute()
        return root / (run or paths.reuse.get(stage, self.config.name)) / stage

    def _mixed(self, stage: str) -> dict[str, StageFolder]:
        """What `train`, and what comes after it, reads of the runs in dataset.mixture.

        "precompute_latents@photos" -> its folder.
        """
        mixture = self.config.dataset.mixture if stage == "train" or "train" in STAGES[stage].reads else {}
        folders = {}
        for name, weight in mixture.items():
            if weight <= 0 or name == self.config.name:
                raise ConfigError(f"dataset.mixture has {name}: {weight}; expected another run with a weight above 0")
            for read in (read for read in STAGES[stage].reads if STAGES[read].kind != "whole"):
                folder = stage_folder(self.home(read, name), read, self.config.cluster.cache)
                if folder.manifest() is None:
                    raise ConfigError(
                        f"dataset.mixture names {name}, whose {read} in {folder.path} is not finished; make it with: "
                        f"python -m pipelines.run +stage={read} name={name}"
                    )
                folders[f"{read}@{name}"] = folder
        return folders

    def _folder(self, stage: str) -> StageFolder:
        path = self.home(stage)
        if STAGES[stage].many:
            read = {"fingerprint": self.fingerprints[stage], "inputs": self.digests_read(stage)}
            path /= sha256_bytes(canonical(read))[:8]
        return stage_folder(path, stage, self.config.cluster.cache)

    def _status(self, stage: str) -> Status:
        job = self.job(stage)
        plan = job.output.read_plan()
        whole = STAGES[stage].kind == "whole"
        if plan is None:
            return Status(job, todo=self.planned(stage) if STAGES[stage].kind == "shards" else [])
        if plan["fingerprint"] != job.fingerprint:
            if self._accepts(stage, plan):
                return Status(job)
            raise StaleError(self._refusal(job, plan), job.output)
        return self._whole_status(job) if whole else self._shards_status(job)

    def _accepts(self, stage: str, plan: dict[str, Any]) -> bool:
        """Whether training goes on with other settings than those of its plan, all of them named by training.accept."""
        now = self.plan(stage)
        changed = {line.partition(":")[0] for line in _differences(plan["what"], now["what"], "")}
        same = all(plan[key] == now[key] for key in ("version", "reads"))
        return stage == "train" and same and changed <= set(self.config.training.accept or ())

    def _inputs_done(self, stage: str) -> bool:
        return all(self.statuses[read].done for read in reads(self.config, stage))

    def _whole_status(self, job: Job) -> Status:
        record = job.output.record()
        if record is None or not self._inputs_done(job.stage):
            return Status(job)
        digests = {name: digest or "" for name, digest in self.digests_read(job.stage).items()}
        if reason := _stale(job, record, digests, job.output.missing_files([record]).get(None)):
            raise StaleError(f"{reason}; {_ways_out(job.stage)}", job.output)
        grown = all(record.facts[path] >= section(self.config, path) for path in STAGES[job.stage].grows)
        back = job.stage == "train" and rewind.is_due(job.output.path, self.config.training)
        funnel = {"rows": record.rows, "samples": record.samples, "dropped": record.dropped}
        return Status(job, grown and not back, funnel=funnel, digest=record.digest)

    def digests_read(self, stage: str) -> dict[str, str | None]:
        """Of everything that a stage reads, runs that are mixed in among it; None where it is not closed."""
        own = {read: self._digest_read(stage, read) for read in reads(self.config, stage)}
        return own | self._mixed_digests(stage)

    def _digest_read(self, stage: str, read: str) -> str | None:
        """What a stage that makes one result reads: it pins an edition, and what comes after `train` reads the same."""
        status = self.statuses[read]
        pinned = self._pinned(stage).get(read) if status.editions else None
        return pinned if pinned in status.editions else status.digest

    def _mixed_digests(self, stage: str) -> dict[str, str]:
        """The same for what is read of the runs in dataset.mixture."""
        digests = {}
        for name, folder in self._mixed(stage).items():
            manifest, pinned = folder.manifest(), self._pinned(stage).get(name)
            digests[name] = pinned if pinned in edition_digests(manifest) else manifest["digest"]
        return digests

    def _pinned(self, stage: str) -> dict[str, str]:
        """The digests that were read by a stage that makes one result, or by `train` where it comes after that."""
        pinning = "train" if "train" in reads(self.config, stage) else stage
        record = read_record(self.home(pinning) / "record.json")
        return record.inputs if record else {}

    def _shards_status(self, job: Job) -> Status:
        records, manifest = job.output.committed(), job.output.manifest()
        if STAGES[job.stage].kind == "table" and manifest is not None:  # the rest belongs to an unfinished edition
            records = {row["shard"]: records[row["shard"]] for row in manifest["shards"] if row["shard"] in records}
        missing = job.output.missing_files(records.values())
        stale = {shard: reason for shard, record in records.items()
                 if (reason := _stale(job, record, self._shard_inputs(job.stage, shard), missing.get(shard)))}
        if stale:
            others = f" (and {len(stale) - 1} more shards like it)" if len(stale) > 1 else ""
            raise StaleError(f"{next(iter(stale.values()))}{others}; {_ways_out(job.stage)}", job.output, list(stale))
        todo = []
        if STAGES[job.stage].kind == "shards":
            todo = [shard for shard in self.planned(job.stage) if shard not in records]
        if manifest is None or todo or not self._inputs_done(job.stage):
            return Status(job, False, todo, records)
        listed = {row["shard"]: row["digest"] for row in manifest["shards"]}
        there = {shard: records[shard].digest for shard in sorted(listed.keys() & records.keys())}
        if there != listed or manifest["digest"] != edition_digest(list(there.values())):
            message = f"{job.output / 'manifest.parquet'} does not list the shards beside it; {_ways_out(job.stage)}"
            raise StaleError(message, job.output, [])
        if len(listed) < len(records):  # the shards of a new edition are made, and wait for its manifest
            return Status(job, False, [], records)
        return Status(job, True, [], records, manifest["funnel"], manifest["digest"], edition_digests(manifest))

    def _shard_inputs(self, stage: str, shard: int) -> dict[str, str]:
        """The digests that the inputs of a shard have now."""
        digests = {}
        for read in reads(self.config, stage):
            status = self.statuses[read]
            if STAGES[read].kind == "whole":
                digests[read] = status.digest or ""
            elif shard in status.records:
                digests[f"{read}/{shard_name(shard)}"] = status.records[shard].digest
        return digests

    def _refusal(self, job: Job, plan: dict[str, Any]) -> str:
        """Names the difference between what lies there and what is asked for, and every way out."""
        now = self.plan(job.stage)
        differences = _differences(plan["what"], now["what"], "")
        differences += [
            f"{read}, which it reads, has other settings too" for read, value in now["reads"].items()
            if plan["reads"].get(read) != value
        ]
        if plan["version"] != now["version"]:
            differences.append(f"version of the stage: {plan['version']} there, {now['version']} now")
        lines = "\n".join(f"  {difference}" for difference in differences)
        return f"{job.stage} in {job.output.path} was made from other settings:\n{lines}\n{_ways_out(job.stage)}"


def _stale(job: Job, record: Record, digests: dict[str, str], missing: list[str] | None) -> str:
    """Says why a record does not count: its fingerprint, its files and its inputs' digests must be those of now."""
    path = job.output.record_path(record.shard)
    if record.fingerprint != job.fingerprint:
        return f"{path} was made from other settings than its plan"
    for name, digest in digests.items():
        if record.inputs.get(name) != digest:
            was = str(record.inputs.get(name))[:12]
            return f"{path} was made from {name} with digest {was}, which now has {digest[:12]}"
    if missing:
        return f"{path} names files that are absent or have another size: {', '.join(missing[:5])}"
    return ""


def _differences(there: Any, now: Any, path: str) -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*there, *now}):
            found += _differences(there.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if there == now else [f"{path}: {there!r} there, {now!r} now"]


def _ways_out(stage: str) -> str:
    return (
        "ways out: name=OTHER makes a new run beside it; the old values read it as it is; "
        f"+stage={stage} overwrite=true deletes what is stale and makes it again"
    )


def connected(job: Job, address: str | None) -> Job:
    """The job with the address that stands in for the hosts of its data set."""
    return replace(job, how=replace(job.how, connect=address))
