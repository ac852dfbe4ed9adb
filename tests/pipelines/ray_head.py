"""A Ray cluster of one node as an administrator would start it: with a job server, on loopback, behind a token."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import urllib3

from pipelines.cluster import ENVIRONMENT
from tests.pipelines.mlflow_server import free_port

RAY = str(Path(sys.executable).parent / "ray")


class RayHead:
    """What a user would type, and what the dashboard says of jobs."""

    def __init__(self, place: str, stop_seconds: int) -> None:
        self.place, self.url = place, f"http://127.0.0.1:{free_port()}"
        self.environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": place, "RAY_API_SERVER_ADDRESS": self.url,
                            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                            "RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds)}  # fmt: skip
        self.environment.pop("RAY_ADDRESS", None)
        self.http = urllib3.PoolManager(
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}, retries=False, timeout=10.0
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}",
            f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
            "--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={self.place}",
        ]  # fmt: skip
        with open(f"{self.place}/head.log", "wb") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def is_up(self) -> bool:
        try:
            return self.http.request("GET", f"{self.url}/api/jobs/").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def submit(self, name: str, folder: Path, command: list[str], *options: str) -> None:
        where = ["--submission-id", name, "--working-dir", str(folder), *options]
        self._job("submit", "--no-wait", *where, "--", *command)

    def stop(self, name: str) -> str:
        """Returns what was said once the job has ended."""
        return self._job("stop", name)

    def _job(self, *arguments: str) -> str:
        done = subprocess.run([RAY, "job", *arguments], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, name: str) -> str:
        return self._asked(name)["status"]

    def ended(self, name: str) -> float:
        """Seconds since the epoch."""
        return self._asked(name)["end_time"] / 1000

    def logs(self, name: str) -> str:
        return self._asked(f"{name}/logs")["logs"]

    def _asked(self, what: str) -> dict[str, Any]:
        return json.loads(self.http.request("GET", f"{self.url}/api/jobs/{what}").data)

    def wait(self, name: str, until: Callable[[], object], seconds: float = 400) -> None:
        """Until something holds, while a job is under way."""
        end = time.monotonic() + seconds
        while not until():
            assert self.status(name) in ("PENDING", "RUNNING") and time.monotonic() < end, self.logs(name)
            time.sleep(0.2)


@contextmanager
def ray_head(stop_seconds: int) -> Iterator[RayHead]:
    """Ended by its own processes' ids: `ray stop` would end every Ray of this user."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        head = RayHead(place, stop_seconds)
        process = head.start()
        try:
            end = time.monotonic() + 180
            while not head.is_up():
                said = Path(place, "head.log").read_text()
                assert process.poll() is None and time.monotonic() < end, said
                time.sleep(0.5)
            yield head
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            _, left = psutil.wait_procs(started, timeout=30)
            for each in left:
                each.kill()
        assert not left, "what the head had started ends with it"
