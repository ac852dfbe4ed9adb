"""Finds a process that stands still: one rank that hangs makes all others wait for it, silently and for ever.

Every process watches itself, so all of them leave their stacks, and whoever launched them starts them again. Both
clocks run outside Python: a thread that hangs in a library without giving Python's lock back is found too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
from pathlib import Path

GRACE_SECONDS = 5.0  # between stacks and end: a process that ends breaks the connections that others still wait on
START_SECONDS = 1800.0  # given to each part of a start, where that is more: models are built, checkpoints are fetched
MARGIN_SECONDS = 60.0  # that a collective waits longer, so that nothing ends a process before its stacks are written
STDERR = 2


def start_seconds(hang_seconds: float | None) -> float | None:
    """How long each part of the start of a training may take; None: any time."""
    return None if hang_seconds is None else max(hang_seconds, START_SECONDS)


def collective_seconds(hang_seconds: float | None) -> float | None:
    """How long a process may wait for the others in one collective; None: as long as its backend has it."""
    longest = start_seconds(hang_seconds)
    return None if longest is None else longest + MARGIN_SECONDS


class Watchdog:
    """Between two calls of `reset` no more than `seconds` may pass (None: any number), or the process ends by SIGALRM.

    The stacks of its threads are then on stderr and in `folder`/rank-00000-PID.txt. A process of its own writes there:
    `folder` may lie on the very file system that everybody hangs on.
    """

    def __init__(self, folder: Path, rank: int, seconds: float | None) -> None:
        self.seconds = seconds
        self._path = folder / f"rank-{rank:05d}-{os.getpid()}.txt"

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = subprocess.Popen(
                ["tee", self._path], stdin=subprocess.PIPE, stdout=STDERR, start_new_session=True
            )
        return self

    def reset(self, long: bool = False) -> None:
        """`long`: before a part of the start, or the end, which may take longer than a step."""
        seconds = start_seconds(self.seconds) if long else self.seconds
        if seconds is not None:
            faulthandler.dump_traceback_later(seconds, file=self._writer.stdin)
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()
            self._writer.communicate()
            if self._path.exists() and not self._path.stat().st_size:
                self._path.unlink()
            signal.setitimer(signal.ITIMER_REAL, 0)
