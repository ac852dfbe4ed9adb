"""One runner for each output; a dead holder stands in nobody's way, a live one in everybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import lock as module
from pipelines.lock import LockedError, lock


def hold(path: Path, seconds: float) -> subprocess.Popen[bytes]:
    code = (
        "import time\nfrom pipelines.lock import lock\n"
        f"with lock({str(path)!r}, 'other'):\n  print(1, flush=True)\n  time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_live_holder_is_named_and_refuses_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock", 30)
    started = time.monotonic()
    with pytest.raises(LockedError, match=f'"pid": {process.pid}'), lock(tmp_path / "lock", "me"):
        pass
    assert time.monotonic() - started < 2
    process.kill()
    process.wait()


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock", 30)
    process.kill()
    process.wait()
    with lock(tmp_path / "lock", "me"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("age, taken", [(30, False), (90, True)])
def test_a_holder_elsewhere_is_replaced_by_age_only(tmp_path: Path, age: int, taken: bool) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"machine": "another", "pid": 1, "started": "1", "what": "train"}))
    os.utime(path, (time.time() - age,) * 2)
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
