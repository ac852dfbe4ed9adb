"""One MLflow run of a stage: how each kind of journal line is told there. Every line may be told twice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.storage import is_remote
from pipelines.journal import FROM_NOTHING
from pipelines.shipping.labels import MAX_KEY, safe_name, shorten, to_csv, to_markdown

MAX_METRICS, MAX_WORDS = 800, 100  # in one request; MLflow takes 1000 in all, and 100 params or tags
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters that MLflow keeps
HEARD_SECONDS = 60.0  # between two words that the driver is there
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # trying again cannot help


class GoneError(RuntimeError):
    """Somebody deleted the run in MLflow."""


def say(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def is_known(client: Any, run_id: str) -> bool:
    """True if MLflow has that run and nobody deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


class StageRun:
    """One MLflow run."""

    def __init__(self, client: Any, run_id: str, output: Path) -> None:
        self.client, self.id, self.output = client, run_id, output
        self._params = dict(client.get_run(run_id).data.params)
        self._images: set[str] | None = None
        self._running, self._heard = False, 0.0

    def send(self, entries: list[dict[str, Any]], steps: dict[str, int] | None) -> None:
        """Sends lines in order. Raises GoneError.

        `steps`, the highest step sent of each metric, is brought up to date; what is not later is left out, because a
        restarted process tells again what follows its checkpoint. None: of a writer that tells nothing again.
        """
        batch = Batch(self)
        for entry in entries:
            kind = entry["kind"]
            if kind == "metrics":
                batch.metrics(entry, steps)
            elif kind in ("params", "tags"):
                batch.words(kind, entry["values"])
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
            if not self.refuses(error):
                raise
            say(f"MLflow does not take {what}: {first_line(error)}")

    def refuses(self, error: Exception) -> bool:
        """True when MLflow understood a request and does not take it; GoneError where that is for want of the run."""
        if getattr(error, "error_code", "") not in REFUSALS:
            return False
        if not is_known(self.client, self.id):
            raise GoneError(f"MLflow's run {self.id} was deleted") from error
        return True

    def leave(self, step: int, time_ms: int) -> None:
        """The run ends where training went back to `step`."""
        reason = "the stage began again from nothing" if step == FROM_NOTHING else f"training went back to step {step}"
        self.guard(lambda: self.client.set_terminated(self.id, "KILLED", time_ms), "the end of a run")
        self.guard(lambda: self.client.set_tag(self.id, "reason", reason), "the tag reason")

    def be_heard(self) -> None:
        """The tag last_heard, now and then: a run whose driver was killed outright says RUNNING for ever."""
        if self._running and time.monotonic() - self._heard >= HEARD_SECONDS:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            self.guard(lambda: self.client.set_tag(self.id, "last_heard", now), "the tag last_heard")
            self._heard = time.monotonic()

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
        key, step = safe_name(entry["key"], image=True), entry["step"] or 0
        if self._images is None:
            self._images = {Path(a.path).name for a in self.client.list_artifacts(self.id, "images")}
        # the names that log_image gives: pictures carry no identity of their own that MLflow would compare
        start, end = f"{key.replace('/', '~')}+step+{step}+", "+compressed.webp"
        if any(name.startswith(start) and name.endswith(end) for name in self._images):
            return
        if (image := _picture(self.output / entry["path"])) is not None:
            self.client.log_image(self.id, image, key=key, step=step, timestamp=entry["time"], synchronous=True)
            self._images.add(start + end)

    def _artifact(self, entry: dict[str, Any]) -> None:
        path = self.output / entry["path"]
        if _is_readable(path):
            self.client.log_artifact(self.id, str(path), safe_name(entry["folder"]) or None)

    def _dataset(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": entry["path"] if is_remote(entry["path"]) else str(self.output / entry["path"])})
        profile = json.dumps({"digest": entry["digest"]})  # whole: the field of that name holds 36 characters
        data = Dataset(entry["name"], entry["digest"][:MAX_DIGEST], "local", source, profile=profile)
        tag = InputTag("mlflow.data.context", entry["context"])
        self.client.log_inputs(self.id, datasets=[DatasetInput(data, [tag])])

    def _model(self, entry: dict[str, Any]) -> None:
        """A logged model that names its place and its hash; no weights are copied, but what was measured of it."""
        from mlflow.entities import LoggedModelOutput

        if self._models(f"tags.sha256 = '{entry['sha256']}'"):
            return
        name, where = safe_name(entry["name"]), str(self.output / entry["path"])
        params = {"step": str(entry["step"]), "path": where, "sha256": entry["sha256"]}
        tags = {"sha256": entry["sha256"], "mlflow.model.isExternal": "true"}
        model = self.client.create_logged_model(self._experiment(), name, self.id, tags, params, "checkpoint")
        for key, value in entry.get("values", {}).items():  # absent in lines of earlier versions
            key, model_id = f"checkpoint/{safe_name(key)}", model.model_id
            self.client.log_metric(self.id, key, value, entry["time"], entry["step"], model_id=model_id)
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
        self._running = entry["status"] == "RUNNING"
        if self._running:
            self.client.update_run(self.id, status="RUNNING")
            return
        self.client.set_terminated(self.id, entry["status"], entry["time"])
        if entry["reason"]:
            self.client.set_tag(self.id, "reason", shorten(entry["reason"], MAX_TAG))


def _picture(path: Path) -> Any | None:
    """A picture of this disk; None, and said, where there is none to be read: that is nothing to wait for."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        say(f"the picture {path} is left out: {first_line(error)}")
        return None


def _is_readable(path: Path) -> bool:
    """Whether a file of this disk can be read to its end; it is said where it cannot."""
    try:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        say(f"the file {path} is left out: {first_line(error)}")
        return False
    return True


class Batch:
    """Metrics, settings and tags on their way, as many in a request as MLflow takes."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self._clear()

    def _clear(self) -> None:
        self._metrics: list[Any] = []
        self._params: list[Any] = []
        self._tags: list[Any] = []

    def metrics(self, entry: dict[str, Any], steps: dict[str, int] | None) -> None:
        """Numbers at a step, but for what was sent of it before."""
        from mlflow.entities import Metric

        for name, value in entry["values"].items():
            key, step = safe_name(name), entry["step"]
            if step is not None and steps is not None:
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
                if not self.run.refuses(error):
                    raise
                self._send_singly()
        self._clear()

    def _send_singly(self) -> None:
        for position, entries in enumerate((self._metrics, self._params, self._tags)):
            for entry in entries:
                parts: list[list[Any]] = [[], [], []]
                parts[position] = [entry]
                self.run.guard(lambda parts=parts: self.run.client.log_batch(self.run.id, *parts), entry.key)
