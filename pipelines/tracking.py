"""MLflow: a run for the DAG, a child run for each stage, sent from the journals by a thread of the driver.

Nobody waits for MLflow. Whoever has something to say appends to a journal (pipelines/journal.py); a thread
(pipelines/shipper.py) reads on from where it stopped, sends, and notes how far it came. If the driver is
killed between sending and noting, the same lines are sent again: a point carries the journal's time, so
that MLflow takes the second one for the first. The ids of the runs lie in outputs/<name>/tracking.json, and
a continued run goes on in the same MLflow runs. When MLflow does not know them (any more), they are made
anew and the journals are sent from their beginning.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.storage import is_remote
from pipelines.journal import RUN, Journal, journal_path, journal_paths, read_entries
from pipelines.labels import MAX_KEY, safe_name, shorten, to_csv, to_markdown
from pipelines.manifest import FORMAT, check_format, read_json, write_json
from pipelines.settings import TrackingConfig
from pipelines.shipper import AwayError, Shipper, journaled_stages, sent_path

READ_BYTES = 1 << 18  # of one journal at a time: what bounds the memory
MAX_METRICS, MAX_WORDS = 800, 100  # in one request; MLflow takes 1000 in all, and 100 params or tags
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters that MLflow keeps
STOPPED_SECONDS = 5.0  # what a run that a signal ended waits at most for MLflow
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
    return settings.uri or f"sqlite:///{Path(output).absolute().parent / 'mlflow.db'}"


def page_command(settings: TrackingConfig, output: str | Path) -> str:
    """What to type, or to open in a browser, to look at the runs."""
    uri = database_uri(settings, output)
    if uri.startswith("http"):
        return uri
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri {uri} --port 5000"


def say(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


# ---- what is sent to MLflow ----------------------------------------------------------------------
def prepare_environment() -> None:
    """Before MLflow is imported: no telemetry, and short waits, because the shipper does its own retrying."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
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
        with _away():
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
                return notes
        notes = {"format": FORMAT, "uri": self.uri, "token": uuid.uuid4().hex, "runs": {}}
        write_json(path, notes)  # before anything is made there: by the token it is found again
        return notes

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
        run.send(entries, sent["steps"])
        if offset == sent["offset"]:  # a line that has no end yet
            return False
        write_json(sent_path(path), {**sent, "offset": offset})
        self.sent_bytes += offset - sent["offset"]
        return True

    def _sent(self, path: Path, run_id: str) -> dict[str, Any]:
        """How far a journal was sent to a run, and the highest step sent of each metric."""
        place = sent_path(path)
        if place.exists():
            sent = check_format(read_json(place), place)
            if sent["run"] == run_id:
                return sent
        return {"format": FORMAT, "run": run_id, "offset": 0, "steps": {}}

    def _run(self, stage: str) -> StageRun:
        if stage not in self.runs:
            self.runs[stage] = StageRun(self.client, self._find_run(stage), self.output)
        return self.runs[stage]

    def _find_run(self, stage: str) -> str:
        """Id of the stage's run: the noted one, else the one that carries our token, else a new one."""
        noted = self.notes["runs"].get(stage)
        if noted is not None and self._is_known(noted):
            return noted
        token = f"{self.notes['token']}/{stage}"
        found = self.client.search_runs([self.experiment], f"tags.`{TOKEN}` = '{token}'", max_results=1)
        run_id = found[0].info.run_id if found else self._create_run(stage, token)
        self.notes["runs"][stage] = run_id
        write_json(self.output / "tracking.json", self.notes)
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
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name)
        return run.info.run_id


class StageRun:
    """One MLflow run, and how each kind of journal line is told there. Every line may be told twice."""

    def __init__(self, client: Any, run_id: str, output: Path) -> None:
        self.client, self.id, self.output = client, run_id, output
        self._params = dict(client.get_run(run_id).data.params)
        self._images: set[str] | None = None

    def send(self, entries: list[dict[str, Any]], steps: dict[str, int]) -> None:
        """Sends lines in order; `steps`, the highest step sent of each metric, is brought up to date."""
        batch = Batch(self)
        for entry in entries:
            kind = entry["kind"]
            if kind == "metrics":
                batch.metrics(entry, steps)
            elif kind in ("params", "tags"):
                batch.words(kind, entry["values"])
            elif kind == "rewind":
                steps.update({key: min(step, entry["step"]) for key, step in steps.items()})
            else:
                batch.send()
                self._tell(kind, entry)
        batch.send()

    def _tell(self, kind: str, entry: dict[str, Any]) -> None:
        tell: dict[str, Callable[[dict[str, Any]], None]] = {
            "text": self._text,
            "table": self._table,
            "image": self._image,
            "artifact": self._artifact,
            "dataset": self._dataset,
            "model": self._model,
            "model_removed": self._model_removed,
            "status": self._status,
        }
        if kind in tell:
            self.guard(lambda: tell[kind](entry), f"{kind} {entry.get('name') or entry.get('key') or ''}")
        else:
            say(f"the journal has a line of the unknown kind {kind!r}; it is left out")

    def guard(self, action: Callable[[], object], what: str) -> None:
        """Does something; what MLflow refuses for good is said and left out, and blocks nothing."""
        from mlflow.exceptions import MlflowException

        try:
            action()
        except MlflowException as error:
            if not refused(error):
                raise
            say(f"MLflow does not take {what}: {first_line(error)}")

    def takes_param(self, key: str, value: str) -> bool:
        """False for a setting that the run has with another value: MLflow never changes one."""
        return self._params.setdefault(key, value) == value

    def _text(self, entry: dict[str, Any]) -> None:
        self.client.log_text(self.id, entry["text"], safe_name(entry["name"]))

    def _table(self, entry: dict[str, Any]) -> None:
        self.client.log_text(self.id, to_csv(entry["rows"]), f"{safe_name(entry['name'])}.csv")
        if entry["name"] == "funnel":  # the first thing that somebody should see who opens the run
            self.client.set_tag(self.id, "mlflow.note.content", shorten(to_markdown(entry["rows"]), MAX_TAG))

    def _image(self, entry: dict[str, Any]) -> None:
        from PIL import Image

        key, step = safe_name(entry["key"], image=True), entry["step"] or 0
        if self._images is None:
            self._images = {Path(a.path).name for a in self.client.list_artifacts(self.id, "images")}
        # the names that log_image gives: pictures carry no identity of their own that MLflow would compare
        start, end = f"{key.replace('/', '~')}+step+{step}+", "+compressed.webp"
        if any(name.startswith(start) and name.endswith(end) for name in self._images):
            return
        path = self.output / entry["path"]
        if not path.is_file():
            say(f"{path}, the picture {key} of step {step}, is gone; it is left out")
            return
        with Image.open(path) as image:
            at = entry["time"]
            self.client.log_image(self.id, image, key=key, step=step, timestamp=at, synchronous=True)
        self._images.add(start + end)

    def _artifact(self, entry: dict[str, Any]) -> None:
        path = self.output / entry["path"]
        if path.is_file():
            self.client.log_artifact(self.id, str(path), safe_name(entry["folder"]) or None)
        else:
            say(f"{path} is gone; it is left out")

    def _dataset(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": entry["path"] if is_remote(entry["path"]) else str(self.output / entry["path"])})
        profile = json.dumps({"digest": entry["digest"]})  # whole: the field of that name holds 36 characters
        data = Dataset(entry["name"], entry["digest"][:MAX_DIGEST], "local", source, profile=profile)
        tag = InputTag("mlflow.data.context", entry["context"])
        self.client.log_inputs(self.id, datasets=[DatasetInput(data, [tag])])

    def _model(self, entry: dict[str, Any]) -> None:
        """A logged model that names its place and its hash; no weights are copied."""
        from mlflow.entities import LoggedModelOutput

        if self._models(f"tags.sha256 = '{entry['sha256']}'"):
            return
        name, where = safe_name(entry["name"]), str(self.output / entry["path"])
        params = {"step": str(entry["step"]), "path": where, "sha256": entry["sha256"]}
        tags = {"sha256": entry["sha256"], "mlflow.model.isExternal": "true"}
        model = self.client.create_logged_model(self._experiment(), name, self.id, tags, params, "checkpoint")
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, entry["step"])])

    def _model_removed(self, entry: dict[str, Any]) -> None:
        for model in self._models(f"name = '{safe_name(entry['name'])}'"):
            self.client.set_logged_model_tags(model.model_id, {"removed": "true"})

    def _models(self, which: str) -> list[Any]:
        """The logged models of this run that a filter finds."""
        return self.client.search_logged_models([self._experiment()], f"source_run_id = '{self.id}' AND {which}")

    def _experiment(self) -> str:
        return self.client.get_run(self.id).info.experiment_id

    def _status(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "RUNNING":
            self.client.update_run(self.id, status="RUNNING")
            return
        self.client.set_terminated(self.id, entry["status"], entry["time"])
        if entry["reason"]:
            self.client.set_tag(self.id, "reason", shorten(entry["reason"], MAX_TAG))


class Batch:
    """Metrics, settings and tags on their way, as many in a request as MLflow takes."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self._clear()

    def _clear(self) -> None:
        self._metrics: list[Any] = []
        self._params: list[Any] = []
        self._tags: list[Any] = []

    def metrics(self, entry: dict[str, Any], steps: dict[str, int]) -> None:
        """A step sent before is left out: a restarted worker tells again what follows its checkpoint."""
        from mlflow.entities import Metric

        for name, value in entry["values"].items():
            key, step = safe_name(name), entry["step"]
            if step is not None:
                if step <= steps.get(key, -1):
                    continue
                steps[key] = step
            self._metrics.append(Metric(key, value, entry["time"], step or 0))
            self._send_if_full()

    def words(self, kind: str, values: dict[str, str]) -> None:
        """Params and tags; a setting that changed when the run was continued is the tag changed/<name>."""
        from mlflow.entities import Param, RunTag

        for name, value in values.items():
            key = safe_name(name)
            if kind == "tags":
                self._tags.append(RunTag(key, shorten(value, MAX_TAG)))
            elif self.run.takes_param(key, shorten(value, MAX_PARAM)):
                self._params.append(Param(key, shorten(value, MAX_PARAM)))
            else:
                self._tags.append(RunTag(f"changed/{key}"[:MAX_KEY], shorten(value, MAX_TAG)))
            self._send_if_full()

    def _send_if_full(self) -> None:
        if len(self._metrics) >= MAX_METRICS or max(len(self._params), len(self._tags)) >= MAX_WORDS:
            self.send()

    def send(self) -> None:
        """One request; if MLflow refuses it, one for each entry, so that a bad entry costs only itself."""
        from mlflow.exceptions import MlflowException

        if self._metrics or self._params or self._tags:
            try:
                self.run.client.log_batch(self.run.id, self._metrics, self._params, self._tags)
            except MlflowException as error:
                if not refused(error):
                    raise
                self._send_singly()
        self._clear()

    def _send_singly(self) -> None:
        for position, entries in enumerate((self._metrics, self._params, self._tags)):
            for entry in entries:
                parts: list[list[Any]] = [[], [], []]
                parts[position] = [entry]
                self.run.guard(lambda parts=parts: self.run.client.log_batch(self.run.id, *parts), entry.key)


def refused(error: Exception) -> bool:
    """True when trying again cannot help: MLflow understood the request and does not take it."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
