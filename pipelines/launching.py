"""Training's processes: started, and started again where what ended them passes.

Ray Train would start them again after every error. Here an error that comes again by nature ends the run, a group that
was asked to stop is not started again, and each restart is told when it happens, on the console and to MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import cluster
from pipelines.dag import Job
from pipelines.journal import Journal, journal_path, read_entries

# Errors of training that a restart would meet again: refusals of ours, mistakes in settings or code, a full disk. All
# others are what befalls machines, devices and connections.
MISTAKES = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, FileNotFoundError,
    AssertionError, NotImplementedError,
)  # fmt: skip


def launch(worker: cluster.TrainingWorker, arguments: dict[str, Any], job: Job, stop: Path) -> None:
    """Runs `worker(arguments, should_leave)` in all processes until they are done, or until a file `stop` lies there.

    A killed process, a lost node or a broken connection starts the group again, up to `max_failures` times: the worker
    finds the newest committed checkpoint itself. A process that was asked to leave, by SIGTERM, has saved with the
    others before it left: that is no failure and is not counted, nor is the loss of a node that was preempted.
    """
    most, failures = job.how.cluster.train.max_failures, 0
    with _telling(job) as (tell, stacks):
        while not stop.exists():
            try:
                return cluster.train_once(worker, arguments, job)
            except cluster.GroupFailed as group:
                if stop.exists() and all(isinstance(error, cluster.Left) for error in group.failures.values()):
                    return
                rank, again = _first_to_tell(group.failures)
                cause = f"first in rank {rank}: {cluster.cause_of(group.failures[rank], job)}"
                stood_still = stacks()
                failures += not group.left
                if stop.exists():
                    raise cluster.StageFailed(
                        f"train was asked to stop and failed before all was saved, {cause}{stood_still}\n"
                        f"It is not started again; the same command goes on from the last checkpoint"
                    ) from group
                if again or failures > most:
                    raise cluster.StageFailed(f"train failed, {cause}{stood_still}") from group
                counted = "" if group.left else f"failure {failures} of {most} that are tried again, "
                tell(f"{counted}{cause.splitlines()[0]}{stood_still}", cause)


def _first_to_tell(failures: dict[int, Exception]) -> tuple[int, bool]:
    """The rank whose error says most, and whether that comes again. Those who only lost others have a RuntimeError."""

    def says_little(rank: int) -> tuple[bool, bool, int]:
        return not comes_again(failures[rank]), isinstance(failures[rank], RuntimeError), rank

    rank = min(failures, key=says_little)
    return rank, comes_again(failures[rank])


def comes_again(error: Exception) -> bool:
    """Whether an error would only be met again by processes that are started again."""
    cause = getattr(error, "cause", None) or error
    refused = getattr(cause, "stops_the_run", False) or isinstance(cause, MISTAKES)
    return refused or getattr(cause, "errno", None) in cluster.FULL


@contextmanager
def _telling(job: Job) -> Iterator[tuple[Callable[[str, str], None], Callable[[], str]]]:
    """What tells of a restart as tag restart/1, restart/2 ... with a text of that name, and what names the stacks that
    came since it was asked.

    Restarts are counted over all runs of the command, so that none takes the place of another.
    """
    journal = Journal(journal_path(Path(job.how.run), job.stage, "launch"))
    known = _stacks(job)

    def tell(what: str, whole: str) -> None:
        count = 1 + sum(entry["kind"] == "tags" for entry in read_entries(journal.path)[0])
        print(f"training starts again, restart {count}: {what}", flush=True)
        journal.tags({f"restart/{count}": what})
        journal.text(f"restart/{count}.txt", whole)

    def stacks() -> str:
        new = sorted(_stacks(job) - known)
        known.update(new)
        limit = job.how.cluster.train.run.hang_seconds
        what = f"\nTraining had stood still for {limit} s; what each process was doing: {', '.join(map(str, new))}"
        return what if new else ""

    try:
        yield tell, stacks
    finally:
        journal.close()


def _stacks(job: Job) -> set[Path]:
    """Files in which processes that stood still left their stacks."""
    return {path for path in (job.output / "stacks").glob("rank-*.txt") if path.stat().st_size}
