"""One MLflow run of a stage: how each kind of journal line is told there. Every line may be told twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.storage import is_remote
from pipelines.shipping.labels import MAX_KEY, safe_name, shorten, to_csv, to_markdown

MAX_METRICS, MAX_WORDS = 800, 100  # in one request; MLflow takes 1000 in all, and 100 params or tags
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters that MLflow keeps


def say(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


class StageRun:
    """One MLflow run."""

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

    def leave(self, step: int, time_ms: int) -> None:
        """The run ends where training went back to `step`."""
        self.client.set_terminated(self.id, "KILLED", time_ms)
        self.client.set_tag(self.id, "reason", f"training went back to step {step}")

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
