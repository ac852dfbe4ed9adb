"""MLflow: a run for the DAG, a child run for each stage, sent from the journals by a thread of the driver.

Nobody waits for MLflow. Whoever has something to say appends to a journal (pipelines/journal.py); a thread
(pipelines/shipping/shipper.py) reads on from where it stopped, sends (pipelines/shipping/server.py), and notes how far
it came. Whether MLflow is there or not, the run is the same; `python -m pipelines.sync` sends what could not be sent.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pipelines.journal import RUN, Journal, journal_path
from pipelines.settings import TrackingConfig
from pipelines.shipping.notes import SQLITE
from pipelines.shipping.server import Server, sending
from pipelines.shipping.shipper import Shipper, journaled_stages
from pipelines.shipping.stage_run import first_line, say

STOPPED_SECONDS = 5.0  # what a run that a signal ended waits at most for MLflow


class Tracker:
    """What the driver says of a run. Opening it leaves no trace; the first stage starts the thread."""

    def __init__(self, settings: TrackingConfig, output: str | Path) -> None:
        self.settings, self.output = settings, Path(output).absolute()
        self._run: Journal | None = None
        self._shipper: Shipper | None = None

    @classmethod
    def open(cls, settings: TrackingConfig, output: str | Path) -> Tracker:
        """The tracker of the run whose results lie in `output`, the folder outputs/<name>."""
        return cls(settings, output)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(error)

    @property
    def run(self) -> Journal:
        """The journal of the DAG itself: settings, code version, the whole funnel."""
        if self._run is None:
            self._run = Journal(journal_path(self.output, RUN))
            self._run.status("RUNNING")
            if self.settings.enabled:
                self._shipper = Shipper(self._sending, self.output, self.settings.interval_seconds)
                self._shipper.start()
        return self._run

    def _sending(self) -> AbstractContextManager[Server]:
        return sending(database_uri(self.settings, self.output), self.settings.experiment, self.output, alive=True)

    @contextmanager
    def stage(
        self, name: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> Iterator[Journal]:
        """The journal of one stage for the time that it runs; how the block ends is how the stage ended."""
        self.run.tags({"stages": " ".join(dict.fromkeys([*journaled_stages(self.output)[1:], name]))})
        journal = Journal(journal_path(self.output, name))
        journal.status("RUNNING")
        journal.tags({"stage": name, **(tags or {})})
        journal.params(params or {})
        try:
            yield journal
        except BaseException as error:
            _end(journal, error)
            raise
        _end(journal, None)

    def close(self, error: BaseException | None = None) -> int:
        """Ends the run, waits up to flush_seconds for what is not sent, returns the bytes that still wait."""
        if self._run is None:
            return 0
        _end(self._run, error)
        self._run = None
        if self._shipper is None:
            return 0
        flush = self.settings.flush_seconds
        stopped = error is not None and not isinstance(error, Exception)
        left = self._shipper.close(min(STOPPED_SECONDS, flush) if stopped else flush)
        if left:
            say(
                f"{left} bytes of {self.output / 'journal'} are not in MLflow "
                f"({self._shipper.trouble or 'it is slow'}); they stay on disk, and this sends them: "
                f"python -m pipelines.sync name={self.output.name}"
            )
        return left


def _end(journal: Journal, error: BaseException | None) -> None:
    if error is None:
        journal.status("FINISHED")
    else:
        state = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            journal.text("error.txt", "".join(traceback.format_exception(error)))
            journal.status(state, f"{type(error).__name__}: {first_line(error)}")
        except OSError as other:  # of a full disk, say: `error` tells of it, and must not be hidden
            say(f"{journal.path} does not say how it ended: {other}")
    journal.close()


def sync(settings: TrackingConfig, output: str | Path) -> int:
    """Sends everything that waits, here and now. Returns the bytes sent; raises AwayError, or LockedError."""
    output = Path(output).absolute()
    with sending(database_uri(settings, output), settings.experiment, output, alive=False) as server:
        while server.ship():
            pass
    return server.sent_bytes


def database_uri(settings: TrackingConfig, output: str | Path) -> str:
    """Where MLflow lies: the setting, or a sqlite file beside the runs (not on NFS: no locks there)."""
    return settings.uri or f"{SQLITE}{Path(output).absolute().parent / 'mlflow.db'}"


def page_command(settings: TrackingConfig, output: str | Path) -> str:
    """What to type, or to open in a browser, to look at the runs."""
    uri = database_uri(settings, output)
    if uri.startswith("http"):
        return uri
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri {uri} --port 5000"
