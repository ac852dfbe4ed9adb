"""One runner for each output; a dead holder stands in nobody's way, a live one in everybody's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ldm import storage
from ldm.storage import StorageError, is_remote, place
from pipelines import lock as module
from pipelines.lock import LockedError, lock
from tests.s3_server import S3Server


def write(path: Any, holder: dict[str, Any], age: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that was touched some seconds ago; S3 keeps no other time than its own, so there the clock is moved."""
    path.parent.mkdir(parents=True, exist_ok=True) if not is_remote(path) else None
    path.write_text(json.dumps(holder))
    if not is_remote(path):
        os.utime(path, (time.time() - age,) * 2)
        return
    look = storage.look
    monkeypatch.setattr(storage, "look", lambda path: (now := look(path)) and storage.Look(now.data, now.version, age))


def hold(path: Path, seconds: float) -> subprocess.Popen[bytes]:
    code = (
        "import time\nfrom pipelines.lock import lock\n"
        f"with lock({str(path)!r}, 'other'):\n  print(1, flush=True)\n  time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_live_holder_is_named_and_refuses_at_once(home: Any) -> None:
    process = hold(home / "lock", 30)
    started = time.monotonic()
    with pytest.raises(LockedError, match=f'"pid": {process.pid}'), lock(home / "lock", "me"):
        pass
    assert time.monotonic() - started < 20  # the holder would keep it for 30
    process.kill()
    process.wait()


def test_a_killed_holder_is_replaced_at_once(home: Any) -> None:
    process = hold(home / "lock", 30)
    process.kill()
    process.wait()
    with lock(home / "lock", "me"):
        assert json.loads((home / "lock").read_text())["pid"] == os.getpid()
    assert not (home / "lock").exists()


@pytest.mark.parametrize("age, taken", [(30, False), (90, True)])
def test_a_holder_elsewhere_is_replaced_by_age_only(
    home: Any, age: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "lock"
    write(path, {"machine": "another", "pid": 1, "started": "1", "what": "train"}, age, monkeypatch)
    if taken:
        with lock(path, "me"):
            pass
    else:
        with pytest.raises(LockedError, match="another"), lock(path, "me"):
            pass


def test_the_heartbeat_keeps_a_long_run_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    with lock(tmp_path / "lock", "me"):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 5


def test_the_heartbeat_is_a_put_on_s3_and_a_lock_that_was_lost_is_told_of(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    path = place(f"s3://bucket/{tmp_path.name}/lock")

    def wait_for_beats(count: int) -> None:
        wanted, deadline = s3.requests["PUT", "lock"] + count, time.monotonic() + 30
        while s3.requests["PUT", "lock"] < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert s3.requests["PUT", "lock"] >= wanted

    with pytest.raises(LockedError, match='taken by another run .*"who": "thief"'), lock(path, "me"):
        wait_for_beats(3)
        assert re.search(rb'"beats": [1-9]', storage.read(path))
        path.write_text('{"who": "thief"}')
        wait_for_beats(1)
    assert storage.read(path) == b'{"who": "thief"}'  # neither beaten nor removed by who lost it


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_that_was_replaced_while_it_slept_leaves_the_lock_alone_and_hears_of_it(
    home: Any, monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    """As a machine does that is stopped for longer than a minute; it may end before its next heartbeat or after it."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02 if beats else 60.0)
    path, successor = home / "lock", json.dumps({"who": "its successor"})
    with pytest.raises(LockedError, match='taken by another run .*"who": "its successor"'), lock(path, "me"):
        path.unlink()
        path.write_text(successor)
        os.utime(path, (0, 0)) if not is_remote(path) else None
        until = time.monotonic() + 30
        while beats and "lock-heartbeat" in {thread.name for thread in threading.enumerate()}:
            assert time.monotonic() < until, "it goes on beating a lock that is not its own"
            time.sleep(0.02)
    assert path.read_text() == successor
    assert is_remote(path) or path.stat().st_mtime == 0


def test_a_store_that_ignores_conditions_is_refused(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Any, data: bytes) -> str:
        path.write_bytes(data)
        return "version"

    monkeypatch.setattr(storage, "create", careless)
    path = place(f"s3://bucket/{tmp_path.name}/lock")
    with pytest.raises(StorageError, match="ignores If-None-Match"), lock(path, "me"):
        pass


@pytest.mark.parametrize("there", ["nothing", "a holder that died"])
def test_eight_contenders_on_s3_have_one_winner(s3: S3Server, tmp_path: Path, there: str) -> None:
    path = place(f"s3://bucket/{tmp_path.name}/lock")
    if there != "nothing":
        process = hold(path, 60)
        process.kill()
        process.wait()
    tried = threading.Barrier(8)  # the winner holds it until all have tried

    def contend(_: int) -> str:
        try:
            with lock(path, "x"):
                tried.wait()
                return "won"
        except LockedError:
            tried.wait()
            return "lost"

    with ThreadPoolExecutor(8) as contenders:
        assert sorted(contenders.map(contend, range(8))) == ["lost"] * 7 + ["won"]
    assert not path.exists()


def test_eight_rescuers_of_one_stale_lock_have_one_winner(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"machine": "another", "pid": 1, "started": "1", "what": "train"}))
    os.utime(path, (0, 0))
    code = (
        "import time, sys\nfrom pipelines.lock import lock, LockedError\n"
        f"try:\n  with lock({str(path)!r}, 'x'): print('won'); time.sleep(3)\nexcept LockedError: print('lost')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    words = [process.communicate()[0].strip() for process in processes]
    assert sorted(words) == ["lost"] * 7 + ["won"]
