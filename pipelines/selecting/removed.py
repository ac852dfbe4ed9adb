"""Which checkpoints saw samples that must go, and which did not.

A checkpoint saw a sample when the sample has a position in the order of training that lies before the checkpoint and
was not left out on purpose. That order is a pure function of what the checkpoint's config.json and its training's
selection say; it is asked for each sample by itself, about ten milliseconds each among 40,000 shards of 10,000, so the
answer is exact at any size. Where something of it is gone the checkpoint must be taken to have seen all of them, and
why is said.

Asked about is every training in the folder of runs that read these latents, by their digests: so those of runs that
have them by paths.reuse or dataset.mixture are found too, with checkpoints that were set aside, with copies where
cluster.train.run.copy_to says, and with those of trainings that began (training.start_from) from a checkpoint that saw
a sample. Batches that were left out because their loss was no number count as seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config import AutoencoderSettings
from pipelines.bucket import stage_folder
from pipelines.config import Config, ConfigError, build
from pipelines.dag import Dag
from pipelines.manifest import Record, StageFolder, edition_digests, read_record, sha256_file
from pipelines.selecting.known_checkpoints import Checkpoint, address_of, checkpoints_in, copies_of, order_key
from pipelines.selecting.visits import NotKnown, Way

SHOWN = 8  # names on a line
NO_EDITION: dict[str, Any] = {"edition": 0, "shards": []}  # of what is not closed yet


@dataclass(frozen=True)
class Sample:
    """A sample that must go."""

    of: str  # "" of the run that was asked about, "@photos" of one that it mixes in
    shard: int
    key: str

    def __str__(self) -> str:
        return f"{self.key}{self.of}"


@dataclass
class Verdict:
    """What a checkpoint saw of the samples that must go."""

    seen: set[str] = field(default_factory=set)
    unsure: list[str] = field(default_factory=list)  # why it must be taken to have seen all of them
    notes: list[str] = field(default_factory=list)
    asked: bool = False  # whether it was trained on any of these latents

    def __str__(self) -> str:
        words = [f"must be taken to have seen them: {why}" for why in self.unsure]
        if not words:
            words = [f"saw {len(self.seen)} of them{_some(self.seen)}" if self.seen else "saw none of them"]
        return "; ".join([*words, *self.notes])


# -- the command's part -------------------------------------------------------------------------------------------
def describe_removed(config: Config, path: Path) -> list[str]:
    """Names the samples on a removal list and the checkpoints that saw them."""
    from pipelines.selection import removal_list

    dag, removed = Dag(config), removal_list(path)
    runs = [None, *config.dataset.mixture]
    samples, trained = find_samples(dag, runs, removed)
    search = Search(dag, runs, samples)
    lines = [f"{path} names {len(samples)} samples of this run{_some(samples)}",
             f"{len(trained)} of them are in the selection that train uses{_some(trained)}"]  # fmt: skip
    if held := search.held_out(dag.home("train")):
        lines.append(f"{len(held)} of them are held out, so that no weight learns from them{_some(held)}")
    said = [f"  {checkpoint.path}: {verdict}" for checkpoint, verdict in search.answers(dag.home("train"))]
    lines += said or ["there is no checkpoint"]
    why = "trained on the pictures themselves, before any selection"
    lines += [f"  {home}: must be taken to have seen them: {why}" for home in search.autoencoders() if samples]
    copies = dag.config.cluster.train.run.copy_to
    asked = f"asked: every training in {dag.run_folder.parent}" + (f", copies in {copies}" if copies else "")
    lines.append(f"{asked}; what lies elsewhere is not known here")
    return [*lines, "dataset.selection.removed=FILE leaves them out of a new run (name=OTHER)"] if samples else lines


def find_samples(dag: Dag, runs: list[str | None], removed: set[str]) -> tuple[list[Sample], list[Sample]]:
    """(samples that are named, those of them that this run's own training selected), in the order of their keys."""
    from pipelines.selection import REMOVED_BY, all_samples, is_removed, read_selection

    found, trained = [], []
    for run in runs:
        of = f"@{run}" if run else ""
        metadata, images = (folder_of(dag, stage, run) for stage in ("filter_metadata", "filter_images"))
        chosen = dag.home("train") / f"selection{of}.parquet"
        masks = read_selection(chosen) if chosen.exists() else {}
        for shard, table in all_samples(metadata, images, images.shards(), REMOVED_BY):
            here = np.flatnonzero(is_removed(table, removed))
            named = [Sample(of, shard, key) for key in table["key"].take(here).to_pylist()]
            found += named
            if shard in masks:
                trained += [sample for sample, used in zip(named, masks[shard][here], strict=True) if used]
    return found, trained


def folder_of(dag: Dag, stage: str, run: str | None) -> StageFolder:
    return stage_folder(dag.home(stage, run), stage, dag.config.cluster.cache)


def _some(names: Iterable[Any]) -> str:
    shown = sorted(map(str, names))
    return f": {', '.join(shown[:SHOWN])}{' ...' if len(shown) > SHOWN else ''}" if shown else ""


# -- every training -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Latents:
    """An edition of the latents of a run that was asked about."""

    of: str
    folder: StageFolder
    edition: int
    digest: str


class Search:
    """All checkpoints of a folder of runs, held against the samples that must go."""

    def __init__(self, dag: Dag, runs: list[str | None], samples: list[Sample]) -> None:
        self.dag, self.samples = dag, samples
        self.latents = defaultdict[str, list[Latents]](list)  # by digest; runs may have made the same
        for run in runs:
            for known in self._editions(run):
                self.latents[known.digest].append(known)
        self.downloads = {digest for run in runs
                          for digest in edition_digests(folder_of(dag, "download", run).manifest() or NO_EDITION)}
        outputs = dag.run_folder.parent
        found = [*checkpoints_in(outputs), *copies_of(dag.config.cluster.train.run.copy_to, outputs)]
        self.checkpoints = {address_of(checkpoint.path): checkpoint for checkpoint in found}
        self.by_weights = {checkpoint.weights: checkpoint for checkpoint in reversed(found) if checkpoint.weights}
        self.verdicts: dict[str, Verdict] = {}
        self._anywhere = lru_cache(self._find_anywhere)
        self._sha256 = lru_cache(sha256_file)  # of weights that many checkpoints began from
        self._way = lru_cache(maxsize=4)(self._make_way)
        self._first = lru_cache(maxsize=16)(self._find_first)

    def _editions(self, run: str | None) -> list[Latents]:
        folder = folder_of(self.dag, "precompute_latents", run)
        digests = edition_digests(folder.manifest() or NO_EDITION)
        return [Latents(f"@{run}" if run else "", folder, i, digest) for i, digest in enumerate(digests, 1)]

    def _find_anywhere(self) -> set[str]:
        """The digests of all latents that there are, of any run."""
        runs = [path.name for path in self.dag.run_folder.parent.iterdir() if path.is_dir()]
        others = {known.digest for run in runs for known in self._editions(run)}
        return others | self.latents.keys()

    def answers(self, own: Path) -> list[tuple[Checkpoint, Verdict]]:
        """The run's own checkpoints, and those of others that have to do with its samples."""
        said = [(checkpoint, self.verdict(checkpoint)) for checkpoint in self.checkpoints.values()]
        return [(checkpoint, verdict) for checkpoint, verdict in said
                if checkpoint.training == own or verdict.asked or verdict.seen or verdict.unsure]  # fmt: skip

    def held_out(self, train: Path) -> list[str]:
        """The samples that must go and that a training held out."""
        known = [checkpoint for checkpoint in self.checkpoints.values() if checkpoint.data]
        own = [checkpoint for checkpoint in known if checkpoint.training == train]
        if not own:
            return []
        try:
            way = self._way(*order_key(own[-1]))
        except NotKnown:
            return []
        return [f"{key}{of}" for cache, of in self._caches(own[-1].data["edition"])
                for key in way.held_out(self._by_place(cache, of))]  # fmt: skip

    def autoencoders(self) -> list[Path]:
        """Autoencoders that were trained on these downloads, or are being trained."""
        homes = sorted(self.dag.run_folder.parent.glob("*/train_autoencoder"))
        records = {home: read_record(home / "record.json") for home in homes}
        return [home for home, record in records.items()
                if (record and record.inputs.get("download") in self.downloads)
                or (home == self.dag.home("train_autoencoder") and (home / "state").exists())]  # fmt: skip

    # -- one checkpoint ------------------------------------------------------------------------------------------
    def verdict(self, checkpoint: Checkpoint) -> Verdict:
        address = address_of(checkpoint.path)
        if address not in self.verdicts:
            self.verdicts[address] = Verdict()  # while it is being found out
            self.verdicts[address] = self._find_verdict(checkpoint) if self.samples else Verdict()
        return self.verdicts[address]

    def _find_verdict(self, checkpoint: Checkpoint) -> Verdict:
        verdict = Verdict()
        if not checkpoint.data:
            verdict.unsure.append("its manifest.json or config.json cannot be read")
            return verdict
        verdict.asked = bool(self._caches(checkpoint.data["edition"]))
        gone = [digest for digest in checkpoint.data["edition"].split() if digest not in self._anywhere()]
        if gone and checkpoint.seen:
            outputs = self.dag.run_folder.parent
            verdict.unsure.append(f"the latents {gone[0][:12]} that it was trained on are of no run in {outputs} now")
        try:
            asked = verdict.asked and checkpoint.seen and not gone
            first = self._first(*order_key(checkpoint), checkpoint.left_out) if asked else {}
            verdict.seen |= {name for name, position in first.items() if position < checkpoint.seen}
        except NotKnown as why:
            verdict.unsure.append(str(why))
        self._inherit(checkpoint, verdict)
        return verdict

    def _inherit(self, checkpoint: Checkpoint, verdict: Verdict) -> None:
        """Adds what was seen by the weights that a training began from."""
        start = checkpoint.settings.get("start_from")
        if start is None:
            return
        parent = self.checkpoints.get(address_of(Path(start).parent))
        if parent is None and Path(start).is_file():
            parent = self.by_weights.get(self._sha256(start))
            if parent is None:
                verdict.notes.append(f"began from {start}, which is of no training here: ask where it was made")
        elif parent is None:
            verdict.unsure.append(f"began from {start}, which is gone")
        if parent is not None and ((known := self.verdict(parent)).seen or known.unsure):
            verdict.seen |= known.seen
            verdict.unsure += known.unsure
            verdict.notes.append(f"began from {parent.path}")

    def _caches(self, editions: str) -> list[tuple[int, str]]:
        """Which of the caches that are trained on are among those that were asked about: (number, whose)."""
        return [(i, known.of) for i, digest in enumerate(editions.split()) for known in self.latents.get(digest, ())]

    def _by_place(self, cache: int, of: str) -> dict[tuple[int, int], list[str]]:
        found = defaultdict(list)
        for sample in self.samples:
            if sample.of == of:
                found[cache, sample.shard].append(sample.key)
        return found

    # -- one training --------------------------------------------------------------------------------------------
    def _find_first(self, train: Path, editions: str, selections: str, settings: tuple[int, ...],
                    left_out: tuple[tuple[int, int], ...]) -> dict[str, int]:  # fmt: skip
        """Name of each sample that this training sees -> its first position."""
        way, first = self._way(train, editions, selections, settings), {}
        for cache, of in self._caches(editions):
            for key, position in way.first_visits(self._by_place(cache, of), left_out).items():
                first[f"{key}{of}"] = min(position, first.get(f"{key}{of}", position))
        return first

    def _make_way(self, train: Path, editions: str, selections: str, settings: tuple[int, ...]) -> Way:
        """Raises NotKnown where latents, selection or plan are not any more what was trained on."""
        from ldm.training.loader import hold_out, mix, order_of
        from pipelines.stages.train import cache_data

        plan = StageFolder(train, "train").read_plan()
        if plan is None:
            raise NotKnown(f"{train / 'plan.json'} is gone")
        mixture = plan["what"].get("dataset.mixture", {})
        try:
            used = build(AutoencoderSettings, plan["what"]["autoencoder"])
        except ConfigError as error:
            raise NotKnown(f"{train / 'plan.json'} is of another version: {error}") from error
        sets = []
        for name, digest, selection in zip(["", *mixture], editions.split(), selections.split(), strict=False):
            latents, records = self._records(digest, name or train.parent.name)
            path = train / f"selection{f'@{name}' if name else ''}.parquet"
            if not path.exists() or sha256_file(path) != selection:
                raise NotKnown(f"{path} is not the selection that it was trained by")
            sets.append(cache_data(latents, records, used, path, selection))
        data = mix(sets, [1.0, *mixture.values()]) if len(sets) > 1 else sets[0]
        if (data.edition, data.selection) != (editions, selections):
            raise NotKnown(f"what {train} was trained on is not what its plan and the latents of now say")
        held_out, seed, lanes, window_shards, batch_size = settings
        trained, held = hold_out(data, held_out)
        return Way(trained, held, order_of(trained, seed, lanes, window_shards, batch_size))

    def _records(self, digest: str, run: str) -> tuple[StageFolder, dict[int, Record]]:
        """The latents of an edition, wherever they lie: among those that were asked about, or in the run's own."""
        same = self.latents.get(digest) or [known for known in self._editions(run) if known.digest == digest]
        if not same:
            raise NotKnown(f"the latents of {run} are not any more those that it was trained on ({digest[:12]})")
        known = same[0]
        manifest, committed = known.folder.manifest(), known.folder.committed()
        listed = [row["shard"] for row in manifest["shards"] if row["edition"] <= known.edition]
        if missing := [shard for shard in listed if shard not in committed]:
            raise NotKnown(f"{known.folder.path} has no record of shard {missing[0]} any more")
        return known.folder, {shard: committed[shard] for shard in listed}
