"""MLflow for one run of the DAG: a run there for the DAG, a child for each stage, and how far each journal is sent.

If the process is killed between sending and noting, the same lines are sent again: a point carries the journal's time,
so that MLflow takes the second one for the first. A continued run goes on in the same MLflow runs. When MLflow does not
know them (any more), they are made anew and the journals are sent from their beginning. So they are when training went
back to an earlier checkpoint: the old run keeps the abandoned steps, and a new one beside it gets what stands, so that
no curve doubles back on itself.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.journal import DRIVER, FROM_NOTHING, RUN, Part, journal_paths, make_durable, read_standing
from pipelines.lock import lock
from pipelines.manifest import FORMAT, check_format, read_json, write_json
from pipelines.shipping.notes import SQLITE, Notes
from pipelines.shipping.shipper import AwayError, journaled_stages, sent_path
from pipelines.shipping.stage_run import GoneError, StageRun, first_line, is_known, say

READ_BYTES = 1 << 18  # of one journal at a time: what bounds the memory
TOKEN = "ldm.run"  # the tag by which a run is found again when its id was not noted


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


@contextmanager
def sending(uri: str, experiment: str, output: Path, alive: bool) -> Iterator[Server]:
    """The server, for the only one who sends the journals of this run. Raises AwayError, or LockedError at once.

    `alive`: whoever sends is the driver itself, and MLflow shows when it was last heard.
    """
    with lock(output / "journal/lock", f"sending {output.name} to MLflow"):
        with _away(), _one_at_a_time(uri):
            server = Server(uri, experiment, output, alive)
        yield server


class Server:
    """MLflow, as one run of the DAG sees it."""

    def __init__(self, uri: str, experiment: str, output: Path, alive: bool) -> None:
        from mlflow.tracking import MlflowClient

        self.output, self.uri, self.alive = output, uri, alive
        self.client = MlflowClient(uri)
        self.experiment = self._find_experiment(experiment)
        self.runs: dict[str, StageRun] = {}
        self.sent_bytes = 0
        self.notes = Notes(output, uri)

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

    # ---- sending ---------------------------------------------------------------------------------
    def ship(self) -> bool:
        """Sends up to READ_BYTES of each journal; False when there was nothing to send. Raises AwayError."""
        with _away():
            return any([self._ship_stage(stage) for stage in journaled_stages(self.output)])

    def _ship_stage(self, stage: str) -> bool:
        """Of one stage. Its run is left for another one when all its journals are sent up to where that begins."""
        try:
            before, rewinds = self.sent_bytes, []
            for path in journal_paths(self.output, stage):
                rewinds.append(self._ship_journal(path, stage))
            if self.alive:
                self._run(stage).be_heard()
            sent = self.sent_bytes > before
            if not sent and (begun := [rewind for rewind in rewinds if rewind is not None]):
                self._leave(stage, min(begun, key=lambda rewind: rewind["way"]))
                return True
            return sent
        except GoneError as error:
            say(f"{error}; its journals are sent to a new one")
            del self.runs[stage]
            return True

    def _ship_journal(self, path: Path, stage: str) -> dict[str, Any] | None:
        """Of one journal. Returns the line before which it stops, where that begins another way."""
        run = self._run(stage)
        sent = self._sent(path, run.id)
        if path.stat().st_size == sent["offset"]:
            return None
        steps = [rewind["step"] for rewind in self.notes.rewinds_of(stage)]
        part = read_standing(path, sent["offset"], READ_BYTES, steps, sent.get("rewinds", 0))
        if part.offset > sent["offset"]:
            run.send(part.entries, None if path.stem == DRIVER else sent["steps"])
            self._note(path, sent, part)
        return part.rewind

    def _sent(self, path: Path, run_id: str) -> dict[str, Any]:
        """How far a journal was sent to a run, the highest step sent of each metric, and the way that it had got to."""
        place = sent_path(path)
        sent = check_format(read_json(place), place) if place.exists() else {}
        if sent.get("run") != run_id:
            return {"format": FORMAT, "run": run_id, "offset": 0, "steps": {}, "rewinds": 0}
        if sent["offset"] > path.stat().st_size:
            say(f"{path} is shorter than what was sent of it; it is sent again from its beginning")
            sent |= {"offset": 0, "rewinds": 0}
            write_json(place, sent)
        return sent

    def _note(self, path: Path, sent: dict[str, Any], part: Part) -> None:
        make_durable(path)  # what is noted as sent is there after a power cut
        write_json(sent_path(path), {**sent, "offset": part.offset, "rewinds": part.way})
        self.sent_bytes += part.offset - sent["offset"]

    def _leave(self, stage: str, rewind: dict[str, Any]) -> None:
        """Ends a stage's run, which keeps what training went back over; the next one is sent all that stands."""
        run = self.runs[stage]
        run.leave(rewind["step"], rewind["time"])
        note = {"step": rewind["step"], "time": rewind["time"], "why": rewind.get("why", ""), "run": run.id}
        self.notes.rewinds[stage] = [*self.notes.rewinds_of(stage), note]
        del self.runs[stage], self.notes.runs[stage]
        self.notes.write()

    # ---- runs ------------------------------------------------------------------------------------
    def _run(self, stage: str) -> StageRun:
        if stage not in self.runs:
            self.runs[stage] = StageRun(self.client, self._find_run(stage), self.output)
        return self.runs[stage]

    def _find_run(self, stage: str) -> str:
        """Id of the stage's run: the noted one, else the one that carries our token, else a new one."""
        noted = self.notes.runs.get(stage)
        if noted is not None and is_known(self.client, noted):
            return noted
        token = self.notes.token_of(stage)
        found = self.client.search_runs([self.experiment], f"tags.`{TOKEN}` = '{token}'", max_results=1)
        run_id = found[0].info.run_id if found else self._create_run(stage, token)
        self.notes.runs[stage] = run_id
        self.notes.write()
        return run_id

    def _create_run(self, stage: str, token: str) -> str:
        tags = {TOKEN: token, "mlflow.source.name": "pipelines.run", "mlflow.source.type": "LOCAL"}
        if stage != RUN:
            if RUN in self.runs and not is_known(self.client, self.runs[RUN].id):  # deleted together with this one
                del self.runs[RUN]
            tags["mlflow.parentRunId"] = self._run(RUN).id
        name, started = self.output.name if stage == RUN else stage, self._began(stage)
        if rewinds := self.notes.rewinds_of(stage):
            last = rewinds[-1]
            tags |= {"went_back_from": last["run"], "went_back_with": last.get("why", "")}
            if last["step"] == FROM_NOTHING:
                name, started = f"{name} from nothing", last["time"]
            else:
                name, tags["went_back_to_step"] = f"{name} from step {last['step']}", str(last["step"])
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name)
        return run.info.run_id

    def _began(self, stage: str) -> int | None:
        """When the first word was said of a stage."""
        first = [read_standing(path, 0, 1, [], 0).entries for path in journal_paths(self.output, stage)]
        return min((entries[0]["time"] for entries in first if entries), default=None)
