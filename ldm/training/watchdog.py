"""Finds a process that stands still: one rank that hangs makes all others wait for it, silently and for ever.

Every process watches itself, so all of them leave their stacks, and whoever launched them starts them again. Both
clocks run outside Python: a thread that hangs in a library without giving Python's lock back is found too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

GRACE_SECONDS = 5.0  # between stacks and end: a process that ends breaks the connections that others still wait on


class Watchdog:
    """Between two calls of `reset` no more than `seconds` may pass (None: any number), or the process ends by SIGALRM.

    The stacks of its threads are then in `folder`/rank-00000-PID.txt.
    """

    def __init__(self, folder: Path, rank: int, seconds: float | None) -> None:
        self.seconds = seconds
        self._path = folder / f"rank-{rank:05d}-{os.getpid()}.txt"

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w")
        return self

    def reset(self) -> None:
        if self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, self.seconds + GRACE_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self.seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
