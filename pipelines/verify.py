"""Checks every byte of finished work and says exactly what is wrong.

    python -m pipelines.verify path=PATH                 a run's folder, a stage's, or any file of one shard
    python -m pipelines.verify path=PATH repair=true     and makes again what is damaged, and only that
    python -m pipelines.verify path=PATH workers=8       processes; as many as there are processors if not given

PATH may be s3://bucket/prefix; every byte of it is fetched anew, one shard at a time for each process, below TMPDIR.

The exit code is 0 when all is sound (or was made so), 1 when something is wrong, 2 when the request does not fit. A
repair takes the damaged shards' records away under the stage's lock and gives the stage's own command again: whatever
has no record is made, and nothing else. What reads a shard that came out with other bytes is then stale, and says so.
A damaged plan is written anew from that command, as far as it gives the fingerprint that is in the stage's records.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from ldm.storage import StorageError, check, exists, is_remote, place
from pipelines.bucket import folder_at, homes_below
from pipelines.checking.checks import (
    MANIFEST,
    PLAN,
    Finding,
    Shard,
    check_shard,
    check_stage,
    readable_records,
    shards_of,
)
from pipelines.lock import LockedError, lock
from pipelines.manifest import StageFolder, read_json

MENDABLE = 2  # exit code of everything that the caller can mend
LINES = 30  # of findings in one shard that are shown
BEGUN = (PLAN, "record.json", MANIFEST)  # any of them shows that a folder is a stage's
OPTIONS = ("path", "repair", "workers")


@dataclass
class Verdict:
    """What was looked at and what is wrong with it."""

    stages: list[StageFolder] = field(default_factory=list)
    shards: int = 0
    findings: list[tuple[StageFolder, Finding]] = field(default_factory=list)

    def damaged(self, folder: StageFolder) -> list[int | None]:
        """The shards of a stage that have to be made again; the stage's own files are written anew with them."""
        shards = {finding.shard for where, finding in self.findings if where.path == folder.path}
        return sorted(shards - {None}) if shards - {None} else list(shards)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        given = read_options(arguments)
        path, workers = place(given["path"]), int(given.get("workers") or os.cpu_count() or 1)
        check(path, "path")
        verdict = verify(path, workers)
        print("\n".join(describe(verdict)), flush=True)
        if not verdict.findings or given.get("repair") != "true":
            return 1 if verdict.findings else 0
        if plans := {folder.path: folder for folder, finding in verdict.findings if finding.file == PLAN}:
            for folder in plans.values():
                mend_plan(folder)
            verdict = verify(path, workers)
        repair(verdict, run_stage)
        verdict = verify(path, workers)
        print("\n".join(describe(verdict)))
        return 1 if verdict.findings else 0
    except (ValueError, FileNotFoundError, LockedError, StorageError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return MENDABLE


def read_options(arguments: list[str]) -> dict[str, str]:
    """The arguments by name. Raises ValueError when they do not fit."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    right = given.get("path") and given.keys() <= set(OPTIONS) and given.get("repair", "false") in ("true", "false")
    if not right or not given.get("workers", "1").isdigit():
        was = " ".join(arguments) or "nothing"
        raise ValueError(f"it takes path=PATH [repair=true] [workers=N] and was given {was}")
    return given


# -- what there is to look at ----------------------------------------------------------------------------------------
def verify(path: Any, workers: int) -> Verdict:
    """Everything that is wrong with a run, a stage or a shard, the shards checked in `workers` processes."""
    verdict, jobs, where = Verdict(), [], []
    for home, only in targets(path):
        folder = folder_at(home, stage_of(home))
        verdict.stages.append(folder)
        try:
            plan = read_plan(folder)
        except ValueError as error:
            verdict.findings.append((folder, Finding(folder.stage, None, PLAN, "", str(error), "the plan as written")))
            continue
        if only is None:
            verdict.findings += [(folder, finding) for finding in check_stage(folder, plan)]
        for shard in shards_of(folder) if only is None else [only]:
            jobs.append(Shard(str(home), plan["stage"], shard, plan))
            where.append(folder)
    for folder, findings in zip(where, _checked(jobs, workers), strict=True):
        verdict.findings += [(folder, finding) for finding in findings]
    verdict.shards = len(jobs)
    return verdict


def read_plan(folder: StageFolder) -> dict[str, Any]:
    """A stage's plan. Raises ValueError when it is none."""
    plan = folder.read_plan()
    if plan is None:
        raise ValueError("nothing")
    if missing := {"stage", "version", "fingerprint", "what", "reads"} - plan.keys():
        raise ValueError(f"a plan that does not say {', '.join(sorted(missing))}")
    if plan["stage"] != folder.stage:
        raise ValueError(f"the plan of {plan['stage']}")
    return plan


def stage_of(home: Any) -> str:
    """The stage whose folder this is; one that is `many` has folders of its own in it."""
    from pipelines.dag import STAGES

    return home.name if home.name in STAGES else home.parent.name


def _checked(jobs: list[Shard], workers: int) -> Iterable[list[Finding]]:
    if min(workers, len(jobs)) <= 1:
        return map(check_shard, jobs)
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("forkserver")) as pool:
        return list(pool.map(check_shard, jobs, chunksize=max(1, len(jobs) // (8 * workers))))


def targets(path: Any) -> list[tuple[Any, int | None]]:
    """(stage's folder, the one shard that is asked for or None) below a run, for a stage, or for a file of a shard."""
    path = path if is_remote(path) else path.absolute()
    if _is_stage(path):
        return [(path, None)]
    shard = re.match(r"\d{6,}", path.name)
    home = next((parent for parent in list(path.parents)[:2] if _is_stage(parent)), None)
    if shard and home:
        return [(home, int(shard[0]))]
    homes = homes_below(path, BEGUN)
    if not homes:
        raise FileNotFoundError(
            f"{path} is no run, no stage and no file of a shard: expected {PLAN} in it, below it or above it"
        )
    return [(home, None) for home in homes]


def _is_stage(path: Any) -> bool:
    return any(exists(path / name) for name in BEGUN)


def describe(verdict: Verdict) -> list[str]:
    """What is wrong, a line each, and what to do about it."""
    counts: dict[tuple[Any, int | None], int] = {}
    lines = []
    for folder, finding in verdict.findings:
        where = (folder.path, finding.shard)
        counts[where] = counts.get(where, 0) + 1
        if counts[where] <= LINES:
            lines.append(str(finding))
    lines += [f"... and {count - LINES} more in {path} shard {shard}"
              for (path, shard), count in counts.items() if count > LINES]
    stages = ", ".join(dict.fromkeys(folder.stage for folder in verdict.stages))
    if not lines:
        return [f"sound: {verdict.shards} shards of {stages}, every byte of them"]
    damaged = [f"{len(shards)} of {folder.stage}" for folder in verdict.stages if (shards := verdict.damaged(folder))]
    count = len(verdict.findings)
    return [*lines, f"{count} things are wrong in {verdict.shards} shards of {stages}; repair=true makes again: "
                    f"{', '.join(damaged)}"]


# -- repair ----------------------------------------------------------------------------------------------------------
def repair(verdict: Verdict, run: Callable[[StageFolder], None]) -> None:
    """Takes the records of damaged shards away, then has each of their stages run, first stages first."""
    from pipelines.dag import STAGES

    order = list(STAGES)
    for folder in sorted(verdict.stages, key=lambda folder: order.index(folder.stage)):
        damaged = verdict.damaged(folder)
        if not damaged:
            continue
        with lock(folder / "lock", f"repair of {folder.path}"):
            folder.clear(damaged)
        print(f"repair: {folder.stage}, shards {', '.join('its result' if n is None else str(n) for n in damaged)}")
        run(folder)


def mend_plan(folder: StageFolder) -> None:
    """Writes a stage's plan anew. Raises ValueError when the stage's own command is not what made its records."""
    from pipelines.config import compose
    from pipelines.dag import Dag
    from pipelines.run import normalise

    arguments = rerun_arguments(folder)
    plan = Dag(compose(normalise(arguments))).plan(folder.stage)
    records = [*readable_records(folder).values(), folder.record()]
    found = {record.fingerprint for record in records if record is not None}
    if wrong := found - {plan["fingerprint"]}:
        raise ValueError(
            f"{folder / PLAN} is damaged, and its records were made from settings with fingerprint {wrong.pop()[:12]}, "
            f"which its last command does not give ({plan['fingerprint'][:12]}): {shlex.join(arguments)}; with the "
            f"settings of then, +stage={folder.stage} overwrite=true makes it again"
        )
    with lock(folder / "lock", f"repair of {folder.path}"):
        folder.write_plan(plan)
    print(f"repair: {folder.stage}, its plan")


def run_stage(folder: StageFolder) -> None:
    """Gives the command again that made a stage, for that stage alone. Raises ValueError when it fails."""
    command = [sys.executable, "-m", "pipelines.run", *rerun_arguments(folder)]
    print(shlex.join(["python", *command[1:]]), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"{folder.stage} was not made again: mend what is said above and give the same command; the damaged shards "
            f"have no record now, so it makes them and nothing else"
        )


def rerun_arguments(folder: StageFolder) -> list[str]:
    """The overrides of the command that made a stage last, turned to that stage alone and to where it lies now."""
    path = folder / "run.json"
    runs = read_json(path)["runs"] if exists(path) else []
    if not runs:
        raise ValueError(
            f"{path} does not say which command made {folder.path}; give it with +stage={folder.stage}: it makes what "
            f"has no record now, and nothing else"
        )
    # A stage that is `many` lies one folder deeper than the others.
    home = folder.path if folder.path.name == folder.stage else folder.path.parent
    place_of = "paths.shards" if is_remote(home) else "paths.outputs"
    ours = {"stage": folder.stage, "name": home.parent.name, place_of: str(home.parent.parent)}
    kept = [word for word in shlex.split(runs[-1]["command"])
            if word.lstrip("+").partition("=")[0] not in {*ours, "overwrite"} and not word.startswith("--")]
    return [*kept, *(f"{'+' if key == 'stage' else ''}{key}={value}" for key, value in ours.items())]


if __name__ == "__main__":
    sys.exit(main())
