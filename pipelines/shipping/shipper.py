"""A thread that carries journals away, in the background, again and again until nothing is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from pipelines.journal import RUN, journal_paths
from pipelines.manifest import read_json

MAX_PAUSE_SECONDS = 30.0


class AwayError(RuntimeError):
    """The receiver cannot be reached, is busy or is broken: a reason to try again later."""


class Shipper(threading.Thread):
    """Calls `ship` again and again until it is closed and nothing is left to send.

    `connect` returns `ship`, which sends a bounded part and returns False when there was nothing to send. Both
    raise AwayError. The thread is a daemon: a receiver that hangs must not keep the process alive.
    """

    def __init__(
        self, connect: Callable[[], Callable[[], bool]], output: Path, interval_seconds: float
    ) -> None:
        super().__init__(name="tracking", daemon=True)
        self.output, self.interval_seconds = output, interval_seconds
        self.trouble = ""  # why the last try failed
        self.done = False  # everything was sent before it ended
        self._connect = connect
        self._wake, self._closing = threading.Event(), threading.Event()

    def run(self) -> None:
        pause, ship = self.interval_seconds, None
        while True:
            closing = self._closing.is_set()  # read before the look, so that nothing written until now stays
            try:
                ship = ship or self._connect()
                sent = ship()
                pause, self.trouble = self.interval_seconds, ""
            except AwayError as error:
                sent, self.trouble = False, str(error)
                pause = self.interval_seconds if closing else min(MAX_PAUSE_SECONDS, 2 * pause)
            if closing and not sent and not self.trouble:
                self.done = True
                return
            if not sent:
                self._wake.wait(pause)
                self._wake.clear()

    def close(self, seconds: float) -> int:
        """Waits until everything is sent, up to `seconds`. Returns the bytes that are not."""
        self._closing.set()
        self._wake.set()
        self.join(seconds)
        if not self.is_alive() and not self.done:
            self.trouble = "its thread died, see above"
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
            sent = read_json(sent_path(path))["offset"] if sent_path(path).exists() else 0
            left += path.stat().st_size - sent
    return left
