"""A thread that carries journals away, in the background, again and again until nothing is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Protocol

from pipelines.journal import RUN, journal_paths
from pipelines.lock import LockedError
from pipelines.manifest import read_json
from pipelines.shipping.stage_run import first_line, say

MAX_PAUSE_SECONDS = 30.0


class AwayError(RuntimeError):
    """The receiver cannot be reached, is busy or is broken: a reason to try again later."""


class Receiver(Protocol):
    """What journals are sent to."""

    def ship(self) -> bool:
        """Sends a bounded part; False when there was nothing to send. Raises AwayError."""


class Shipper(threading.Thread):
    """Lets a receiver `ship` again and again until it is closed and nothing is left to send.

    `connect` gives the receiver for the time of a block; it raises AwayError, or LockedError where another process
    sends. Whatever goes wrong is said once, and tried again. The thread is a daemon: a receiver that hangs must not
    keep the process alive.
    """

    def __init__(
        self, connect: Callable[[], AbstractContextManager[Receiver]], output: Path, interval_seconds: float
    ) -> None:
        super().__init__(name="tracking", daemon=True)
        self.output, self.interval_seconds = output, interval_seconds
        self.trouble = ""  # why the last try failed
        self.done = False  # everything was sent before it ended
        self._connect = connect
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> None:
        with suppress(LockedError), ExitStack() as stack:  # of a lock that was lost nobody need hear at the end
            self._work(stack)

    def _work(self, stack: ExitStack) -> None:
        pause, receiver = self.interval_seconds, None
        while not self._given_up.is_set():
            closing = self._closing.is_set()  # read before the look, so that nothing written until now stays
            try:
                receiver = receiver or stack.enter_context(self._connect())
                sent = receiver.ship()
                pause = self.interval_seconds
                self._say("")
            except Exception as error:  # a mistake of ours too must not end the thread, and be found after weeks
                sent = False
                pause = self.interval_seconds if closing else min(MAX_PAUSE_SECONDS, 2 * pause)
                kind = "" if isinstance(error, (AwayError, LockedError)) else f"{type(error).__name__}: "
                self._say(kind + first_line(error))
            if closing and not sent and (not self.trouble or not unsent_bytes(self.output)):
                self.done = True
                return
            if not sent:
                self._wake.wait(pause)
                self._wake.clear()

    def _say(self, trouble: str) -> None:
        """Once when trouble begins, and once when it is over."""
        if trouble and not self.trouble:
            say(f"nothing goes to MLflow, which is tried again and again; the journals keep all of it: {trouble}")
        elif self.trouble and not trouble:
            say("MLflow takes what it is sent again")
        self.trouble = trouble

    def close(self, seconds: float) -> int:
        """Waits until everything is sent, up to `seconds`. Returns the bytes that are not; they are sent no more."""
        self._closing.set()
        self._wake.set()
        self.join(seconds)
        self._given_up.set()
        self._wake.set()
        return 0 if self.done else unsent_bytes(self.output)


def sent_path(journal: Path) -> Path:
    """Where it is noted how far a journal was sent."""
    return journal.with_suffix(".sent.json")


def journaled_stages(output: Path) -> list[str]:
    """Stages that have a journal; that of the DAG comes first: its run is the parent of the others."""
    names = sorted(path.name for path in (output / "journal").glob("*") if path.is_dir())
    return sorted(names, key=lambda name: name != RUN)


def unsent_bytes(output: Path) -> int:
    """Bytes of the journals that were not yet sent."""
    left = 0
    for stage in journaled_stages(output):
        for path in journal_paths(output, stage):
            sent, size = read_json(sent_path(path))["offset"] if sent_path(path).exists() else 0, path.stat().st_size
            left += size - sent if sent <= size else size  # one that was cut short is sent again
    return left
