"""SIGTERM and SIGINT: from Ctrl-C, a cluster that wants its machine back, or `ray job stop`.

A run may be killed at any moment and goes on from what is committed. A signal is kinder than that: training, which
would lose the steps since its last checkpoint, is asked to save first and loses none; every other stage ends at once.
The second signal ends everything at once.

A signal to one training process alone means that process, not the run: all save and leave, and pipelines/launching.py
starts them again.

`ray job stop` kills what is left after RAY_JOB_STOP_WAIT_TIME_S, 3 seconds unless the head node is started with more:
set 300 there, or for one job by --runtime-env-json='{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'. It signals
every process that the job started, so a job joins the cluster (cluster.address=auto) and starts no Ray.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVING_SECONDS = 30  # what training may take to save and leave


class Stopped(BaseException):
    """A signal ended the run. No error of any stage, so whoever catches those lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.exit_code = 128 + number


@contextmanager
def ending() -> Iterator[None]:
    """While the block runs, a signal ends it with Stopped: locks are given back, Ray and the journal are closed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled_by(end):
        yield


@contextmanager
def asking(ask: Callable[[], None], asked: str) -> Iterator[None]:
    """While the block runs, the first signal calls `ask` and says `asked`; the block may take its time to end.

    Then Stopped is raised. A second signal raises it at once.
    """
    caught: list[int] = []

    def first(number: int, frame: FrameType | None) -> None:
        if caught:
            raise Stopped(number)
        caught.append(number)
        ask()
        print(f"{signal.Signals(number).name}: {asked}; once more ends it at once", flush=True)

    with _handled_by(first):
        yield
    if caught:
        raise Stopped(caught[0])


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM to this process ends nothing; what is yielded says whether it came.

    It works in any thread: Python takes handlers in the main one only, where Ray's workers have no place for ours. So
    the handler is faulthandler's, which writes a stack to a file; that there is one is all that is asked.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.register(signal.SIGTERM, file=file, all_threads=False)
        try:
            yield lambda: os.fstat(file.fileno()).st_size > 0
        finally:
            faulthandler.unregister(signal.SIGTERM)


def warn_of_short_grace() -> None:
    """Says so where `ray job stop` would kill this process before training has saved."""
    grace = int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3))  # a job has the head node's environment, and its own
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and grace < SAVING_SECONDS:
        print(
            f"`ray job stop` would kill this job after {grace} s, before training has saved: the head node wants to be "
            f"started, or the job to be submitted, with RAY_JOB_STOP_WAIT_TIME_S=300",
            flush=True,
        )


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
