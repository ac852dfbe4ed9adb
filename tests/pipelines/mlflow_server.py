"""A real MLflow server on loopback, over a sqlite file, which notes how it answered; servers that serve nobody; and
what the tests ask of MLflow."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from pipelines.manifest import read_json
from pipelines.settings import TrackingConfig
from pipelines.shipping.server import prepare_environment


# ---- what is asked -------------------------------------------------------------------------------
def settings(uri: str | None = None, enabled: bool = True, flush: float = 60.0) -> TrackingConfig:
    return TrackingConfig(enabled, uri, "test", interval_seconds=0.05, flush_seconds=flush)


def client(uri: str) -> Any:
    prepare_environment()
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, output: Path) -> dict[str, Any]:
    """The MLflow run of each stage that the run's notes name."""
    notes = read_json(output / "tracking.json")
    return {stage: client(uri).get_run(run_id) for stage, run_id in notes["runs"].items()}


def all_runs_of(uri: str, output: Path) -> list[Any]:
    """Every MLflow run that carries the run's token, whether its notes name it or not."""
    experiment = next(iter(runs_of(uri, output).values())).info.experiment_id
    token = read_json(output / "tracking.json")["token"]
    return list(client(uri).search_runs([experiment], f"tags.`ldm.run` LIKE '{token}%'"))


def points(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, key)]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


# ---- servers -------------------------------------------------------------------------------------
@contextmanager
def unhelpful_server(kind: str, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Refuses connections, accepts them and never answers, or answers 500: the address, and what it was asked."""
    released, asked = threading.Event(), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            released.wait(0 if kind == "answers 500" else 60)
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    if kind == "refuses":
        yield "http://127.0.0.1:9", asked
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        released.set()
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """The server of a folder; it may be killed and started again, on the same port and the same data."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        self.folder, self.port, self.workers = folder, free_port(), workers
        self.uri, self.log = f"http://127.0.0.1:{self.port}", folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", str(self.workers),
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination", str(self.folder / "art"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float = 180) -> None:
        """Until it answers."""
        end, http = time.monotonic() + seconds, urllib3.PoolManager(retries=False, timeout=5.0)
        while not self._is_well(http):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def _is_well(self, http: urllib3.PoolManager) -> bool:
        try:
            return http.request("GET", f"{self.uri}/health").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def kill(self) -> None:
        """At once, with all processes that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def answers(self) -> Counter[int]:
        """How often it gave each HTTP status, as its log of requests has it."""
        return Counter(int(status) for status in re.findall(r'HTTP/1\.\d" (\d{3})', self.log.read_text()))

    def __enter__(self) -> MlflowServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


TOGETHER = """
import os, sys, time
from pathlib import Path
from pipelines import tracking
from pipelines.settings import TrackingConfig
from pipelines.shipping.server import prepare_environment

prepare_environment()
import mlflow.tracking  # once: the children below begin with it

def run(output, steps):
    tracker = tracking.Tracker.open(TrackingConfig(True, sys.argv[1], "together", 0.2, 300.0), output)
    with tracker.stage("train") as journal:
        for step in range(steps):
            journal.metrics({"loss": float(step)}, step)
            time.sleep(0.01)  # a step
    return tracker.close()

children = []
for output in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        left = run(Path(output), int(sys.argv[2]))
        os._exit(1 if left else 0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def run_together(uri: str, outputs: list[Path], steps: int) -> list[int]:
    """Runs at once, each in a process of its own; for each of them 0 where it sent all that it had to say."""
    command = [sys.executable, "-c", TOGETHER, uri, str(steps), *map(str, outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
