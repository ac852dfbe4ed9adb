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
from pipelines.config import Config, ConfigError, compose
from pipelines.dag import Dag, check_places, reads
from pipelines.manifest import StaleError
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
            from pipelines.selecting.removed import describe_removed

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


if __name__ == "__main__":
    sys.exit(main())
