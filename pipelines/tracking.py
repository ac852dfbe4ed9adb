"""MLflow: a run for the DAG, a child run for each stage, sent from the journals by a thread of the driver.

Nobody waits for MLflow. Whoever has something to say appends to a journal (pipelines/journal.py); a thread
(pipelines/shipping/shipper.py) reads on from where it stopped, sends, and notes how far it came. If the driver is
killed between sending and noting, the same lines are sent again: a point carries the journal's time, so
that MLflow takes the second one for the first. The ids of the runs lie in outputs/<name>/tracking.json, and
a continued run goes on in the same MLflow runs. When MLflow does not know them (any more), they are made
anew and the journals are sent from their beginning. So they are when training went back to an earlier
checkpoint: the old run keeps the abandoned steps, and a new one beside it gets what stands, so that no curve
doubles back on itself.
"""

from __future__ import annotations

import fcntl
import os
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.journal import RUN, Journal, journal_path, journal_paths, read_entries, that_stand
from pipelines.manifest import FORMAT, check_format, read_json, write_json
from pipelines.settings import TrackingConfig
from pipelines.shipping.shipper import AwayError, Shipper, journaled_stages, sent_path
from pipelines.shipping.stage_run import StageRun, first_line, say

READ_BYTES = 1 << 18  # of one journal at a time: what bounds the memory
STOPPED_SECONDS = 5.0  # what a run that a signal ended waits at most for MLflow
SQLITE = "sqlite:///"
TOKEN = "ldm.run"  # the tag by which a run is found again when its id was not noted


# ---- what the driver says ------------------------------------------------------------------------
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
                self._shipper = Shipper(self._connect, self.output, self.settings.interval_seconds)
                self._shipper.start()
        return self._run

    def _connect(self) -> Callable[[], bool]:
        return Server.connect(self.settings, self.output).ship

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
        journal.text("error.txt", "".join(traceback.format_exception(error)))
        journal.status(state, f"{type(error).__name__}: {first_line(error)}")
    journal.close()


def sync(settings: TrackingConfig, output: str | Path) -> int:
    """Sends everything that waits, here and now. Returns the bytes sent; raises AwayError."""
    output = Path(output).absolute()
    server = Server.connect(settings, output)
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


# ---- what is sent to MLflow ----------------------------------------------------------------------
def prepare_environment() -> None:
    """Before MLflow is imported: no telemetry, few lines, and short waits, because the shipper tries again itself."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a run ends with the page's address anyway
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def _away() -> Iterator[None]:
    """AwayError for what MLflow raises when it cannot be reached, is busy or is broken."""
    prepare_environment()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise AwayError(first_line(error)) from error


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """MLflow makes the tables of a new file in every process that opens it, and two that do so at once both fail."""
    if not uri.startswith(SQLITE):
        yield
        return
    with open(f"{uri.removeprefix(SQLITE)}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Server:
    """MLflow for one run of the DAG: its runs there, and how far each journal is sent."""

    def __init__(self, settings: TrackingConfig, output: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.output, self.uri = output, database_uri(settings, output)
        self.client = MlflowClient(self.uri)
        self.experiment = self._find_experiment(settings.experiment)
        self.runs: dict[str, StageRun] = {}
        self.sent_bytes = 0
        self.notes = self._read_notes()

    @classmethod
    def connect(cls, settings: TrackingConfig, output: Path) -> Server:
        """Raises AwayError."""
        with _away(), _one_at_a_time(database_uri(settings, output)):
            return cls(settings, output)

    def _find_experiment(self, name: str) -> str:
        """The experiment's id. A local database keeps artifacts beside it, a server decides for itself."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        place = None if self.uri.startswith("http") else (self.output.parent / "mlartifacts").as_uri()
        # The page opens with runs and curves, not with the traces of chats.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return self.client.create_experiment(name, artifact_location=place, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self.client.get_experiment_by_name(name).experiment_id  # another run was quicker

    def _read_notes(self) -> dict[str, Any]:
        """tracking.json; begun anew when the runs go to another place."""
        path = self.output / "tracking.json"
        if path.exists():
            notes = check_format(read_json(path), path)
            if notes["uri"] == self.uri:
                return {"rewinds": {}, **notes}
        notes = {"format": FORMAT, "uri": self.uri, "token": uuid.uuid4().hex, "runs": {}, "rewinds": {}}
        write_json(path, notes)  # before anything is made there: by the token it is found again
        return notes

    def _write_notes(self) -> None:
        write_json(self.output / "tracking.json", self.notes)

    def ship(self) -> bool:
        """Sends up to READ_BYTES of each journal; False when there was nothing to send. Raises AwayError."""
        sent = False
        with _away():
            for stage in journaled_stages(self.output):
                for path in journal_paths(self.output, stage):
                    sent |= self._ship_journal(path, stage)
        return sent

    def _ship_journal(self, path: Path, stage: str) -> bool:
        run = self._run(stage)
        sent = self._sent(path, run.id)
        if path.stat().st_size == sent["offset"]:
            return False
        entries, offset = read_entries(path, sent["offset"], READ_BYTES)
        rewinds = [rewind["step"] for rewind in self._rewinds(stage) if rewind["journal"] == path.name]
        entries, coming, back = that_stand(entries, rewinds[sent.get("rewinds", 0) :])
        run.send(entries, sent["steps"])
        if back is not None:
            self._leave(stage, path, back)
            return True
        if offset == sent["offset"]:  # a line that has no end yet
            return False
        write_json(sent_path(path), {**sent, "offset": offset, "rewinds": len(rewinds) - len(coming)})
        self.sent_bytes += offset - sent["offset"]
        return True

    def _rewinds(self, stage: str) -> list[dict[str, Any]]:
        """Each time that training went back: to which step, by which journal, and the run that was left for it."""
        return self.notes["rewinds"].get(stage, [])

    def _leave(self, stage: str, path: Path, back: dict[str, Any]) -> None:
        """Ends a stage's run, which keeps what training went back over; the next one is sent all that stands."""
        run = self.runs.pop(stage)
        run.leave(back["step"], back["time"])
        rewind = {"step": back["step"], "journal": path.name, "run": run.id}
        self.notes["rewinds"][stage] = [*self._rewinds(stage), rewind]
        del self.notes["runs"][stage]
        self._write_notes()

    def _sent(self, path: Path, run_id: str) -> dict[str, Any]:
        """How far a journal was sent to a run, the highest step sent of each metric, and how often it went back."""
        place = sent_path(path)
        if place.exists():
            sent = check_format(read_json(place), place)
            if sent["run"] == run_id:
                return sent
        return {"format": FORMAT, "run": run_id, "offset": 0, "steps": {}, "rewinds": 0}

    def _run(self, stage: str) -> StageRun:
        if stage not in self.runs:
            self.runs[stage] = StageRun(self.client, self._find_run(stage), self.output)
        return self.runs[stage]

    def _find_run(self, stage: str) -> str:
        """Id of the stage's run: the noted one, else the one that carries our token, else a new one."""
        noted = self.notes["runs"].get(stage)
        if noted is not None and self._is_known(noted):
            return noted
        rewinds = len(self._rewinds(stage))
        token = f"{self.notes['token']}/{stage}" + (f"/{rewinds}" if rewinds else "")
        found = self.client.search_runs([self.experiment], f"tags.`{TOKEN}` = '{token}'", max_results=1)
        run_id = found[0].info.run_id if found else self._create_run(stage, token)
        self.notes["runs"][stage] = run_id
        self._write_notes()
        return run_id

    def _is_known(self, run_id: str) -> bool:
        """True if MLflow has that run and nobody deleted it."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _create_run(self, stage: str, token: str) -> str:
        tags = {TOKEN: token, "mlflow.source.name": "pipelines.run", "mlflow.source.type": "LOCAL"}
        if stage != RUN:
            tags["mlflow.parentRunId"] = self._run(RUN).id
        opened = [read_entries(path, 0, 1)[0] for path in journal_paths(self.output, stage)]
        started = min((entries[0]["time"] for entries in opened if entries), default=None)
        name = self.output.name if stage == RUN else stage
        if rewinds := self._rewinds(stage):
            name += f" from step {rewinds[-1]['step']}"
            tags |= {"went_back_from": rewinds[-1]["run"], "went_back_to_step": str(rewinds[-1]["step"])}
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name)
        return run.info.run_id
