"""Where a run stands, and which checkpoints saw samples that must go.

    python -m pipelines.status                       the default run: stages, shards, rows, dropped by reason
    python -m pipelines.status name=mine             another one; the same arguments as pipelines.run
    python -m pipelines.status removed=FILE          and the checkpoints that saw what the file names: keys, URLs or
                                                     hashes, one a line, as for dataset.selection.removed

Nothing is changed, and nothing but files is looked at: it may be asked at any time, also beside a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ldm.storage import StorageError, read
from pipelines import quarantine
from pipelines.bucket import stage_folder
from pipelines.config import Config, ConfigError, compose
from pipelines.dag import Dag, check_places, reads
from pipelines.manifest import StageFolder, StaleError, read_json
from pipelines.summary import funnel_of

WIDTH = 100  # of a line of reasons


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 when the request does not fit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    removed = [argument.partition("=")[2] for argument in arguments if argument.startswith("removed=")]
    try:
        config = compose([argument for argument in arguments if not argument.startswith("removed=")])
        check_places(config)
        print("\n".join(describe(config)))
        if removed:
            print("\n".join(["", *describe_removed(config, Path(removed[-1]))]))
    except (ConfigError, FileNotFoundError, StorageError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    return 0


# -- stages -----------------------------------------------------------------------------------------------------------
def describe(config: Config) -> list[str]:
    """A line for each stage, and below it what it dropped and who is at work on it."""
    dag = Dag(config)
    lines = [f"{dag.run_folder}", f"{'stage':<20}{'state':<24}{'in':>12}{'out':>12}{'dropped':>12}"]
    for stage in dag.wanted():
        state, funnel, notes = state_of(dag, stage)
        counts = [funnel["rows"], funnel["samples"], sum(funnel["dropped"].values())] if funnel else []
        lines.append(f"{stage:<20}{state:<24}{''.join(f'{count:>12,}' for count in counts)}".rstrip())
        if funnel and funnel["dropped"]:
            by_count = sorted(funnel["dropped"].items(), key=lambda item: (-item[1], item[0]))
            lines += _wrapped([f"{reason} {count:,}" for reason, count in by_count])
        lines += [f"    {note}" for note in notes]
    return lines


def state_of(dag: Dag, stage: str) -> tuple[str, dict[str, Any] | None, list[str]]:
    """(done, open, running, stale or not begun; the funnel so far; what else to say) of one stage."""
    notes = [f"held by {holder}"] if (holder := held_by(dag.home(stage) / "lock")) else []
    unknown = [read for read in reads(dag.config, stage) if read not in dag.statuses]
    if unknown:
        return "not known", None, [*notes, f"because of {', '.join(unknown)}"]
    try:
        status = dag.refresh(stage)
    except StaleError as error:
        return "stale", None, [*notes, *str(error).splitlines()]
    notes += quarantine.describe(stage, status.records.values())
    funnel = funnel_of(status)
    if status.done:
        editions = f", edition {len(status.editions)}" if len(status.editions) > 1 else ""
        return f"done{editions}", funnel, notes
    shards = f" {len(status.records)} of {len(status.records) + len(status.todo)}" if status.todo else ""
    if holder:
        return f"running{shards}", funnel, notes
    begun = status.records or status.job.output.read_plan()
    return (f"open{shards}" if begun else "not begun"), funnel, notes


def held_by(path: Any) -> str:
    """Who holds a lock, or nothing."""
    try:
        holder = json.loads(read(path))
    except (FileNotFoundError, ValueError):
        return ""
    return f"{holder['what']}, process {holder['pid']} on {holder['host']}"


def _wrapped(words: list[str]) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{word}"
    return [f"    {line}" for line in lines]


# -- what must go -----------------------------------------------------------------------------------------------------
def describe_removed(config: Config, path: Path) -> list[str]:
    """Names the samples on a removal list and the checkpoints that saw them."""
    from pipelines.selection import all_samples, is_removed, read_selection, removal_list

    dag, epoch = Dag(config), 0
    train = StageFolder(dag.home("train"), "train")
    removed, found, trained = removal_list(path), [], []
    for run in (None, *config.dataset.mixture):
        metadata, images = (stage_folder(dag.home(stage, run), stage, config.cluster.cache)
                            for stage in ("filter_metadata", "filter_images"))  # fmt: skip
        of = f"@{run}" if run else ""
        chosen = train / f"selection{of}.parquet"
        masks = read_selection(chosen) if chosen.exists() else {}
        for shard, table in all_samples(metadata, images, images.shards()):
            here = is_removed(table, removed)
            keys = [f"{key}{of}" for key in table["key"].to_pylist()]
            found += [keys[i] for i in here.nonzero()[0]]
            trained += [keys[i] for i in (here & masks[shard]).nonzero()[0]] if shard in masks else []
        epoch += sum(int(mask.sum()) for mask in masks.values())
    lines = [f"{path} names {len(found)} samples of this run{_some(found)}",
             f"{len(trained)} of them are in the selection that train uses{_some(trained)}"]  # fmt: skip
    return [*lines, *_checkpoints(train, epoch, bool(trained))]


def _checkpoints(train: StageFolder, epoch: int, any_trained: bool) -> list[str]:
    """A line for each checkpoint: the first epoch visits every sample once, so within it nobody can be sure."""
    lines = []
    for folder in sorted(train.path.glob("step-*/COMMITTED")):
        seen = read_json(folder.parent / "manifest.json")["samples_seen"]
        if not any_trained or not seen:
            verdict = "saw none of them"
        elif seen >= epoch:
            verdict = "saw them"
        else:
            verdict = f"may have seen them: {seen:,} samples of a first epoch of {epoch:,}"
        lines.append(f"  {folder.parent}: {verdict}")
    if any_trained:
        lines.append("dataset.selection.removed=FILE leaves them out of a new run (name=OTHER)")
    return lines or ["there is no checkpoint"]


def _some(keys: list[str]) -> str:
    return f": {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" if keys else ""


if __name__ == "__main__":
    sys.exit(main())
