"""A node fetches each file of an object store once, keeps within its limit, and believes nothing unchecked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm import node_cache
from ldm.node_cache import POLL_SECONDS, DamagedFile, NodeCache
from ldm.storage import StorageError, StoredFile
from tests.s3_server import BUCKET, S3Server

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
SIZE = 1000
CHILD = """
import sys
from ldm.node_cache import NodeCache
from ldm.storage import StoredFile
cache = NodeCache(sys.argv[1], 10**6)
files = [StoredFile(place, int(size), sha256) for place, size, sha256 in (each.split(",") for each in sys.argv[2:])]
print("ready", flush=True)
sys.stdin.readline()
for stored in files:
    with cache.file(stored) as path:
        print(path.name, len(path.read_bytes()), flush=True)
"""


def put(s3: S3Server, name: str, fill: int = 1) -> StoredFile:
    data = bytes([fill]) * SIZE
    s3.put(f"cache/{name}", data)
    return StoredFile(f"s3://{BUCKET}/cache/{name}", SIZE, hashlib.sha256(data).hexdigest())


def kept(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.root().iterdir() if path.suffix in (".tar", ".part")}


def name_of(stored: StoredFile) -> str:
    return f"{stored.sha256}.tar"


def test_processes_of_a_node_share_one_copy(s3: S3Server, tmp_path: Path) -> None:
    files = [put(s3, f"shared-{i}.tar", 10 + i) for i in range(4)]
    command = [sys.executable, "-c", CHILD, str(tmp_path), *(f"{f.place},{f.bytes},{f.sha256}" for f in files)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    said = [child.communicate("go\n", timeout=120)[0] for child in children]  # all at once
    assert said == ["".join(f"{name_of(f)} {SIZE}\n" for f in files)] * 3
    assert {s3.requests["GET", f"shared-{i}.tar"] for i in range(4)} == {1}


def test_threads_that_ask_at_once_wait_for_the_one_that_fetches(s3: S3Server, tmp_path: Path) -> None:
    stored, cache, all_ask = put(s3, "threads.tar"), NodeCache(str(tmp_path), 10**6), threading.Barrier(6)

    def ask() -> bytes:
        all_ask.wait()
        with cache.file(stored) as path:
            return path.read_bytes()

    with ThreadPoolExecutor(6) as threads:
        assert {future.result() for future in [threads.submit(ask) for _ in range(6)]} == {b"\x01" * SIZE}
    assert s3.requests["GET", "threads.tar"] == 1


def test_the_limit_holds_and_what_was_used_longest_ago_goes(s3: S3Server, tmp_path: Path) -> None:
    a, b, c = (put(s3, f"lru-{i}.tar", 20 + i) for i in range(3))
    cache = NodeCache(str(tmp_path), 2 * SIZE)
    for stored in (a, b, a, c):
        with cache.file(stored):
            pass
    assert kept(cache) == {name_of(a), name_of(c)}
    with cache.file(b):
        assert kept(cache) == {name_of(b), name_of(c)} and s3.requests["GET", "lru-1.tar"] == 2


def test_what_somebody_reads_is_not_thrown_out(s3: S3Server, tmp_path: Path) -> None:
    a, b, c = (put(s3, f"held-{i}.tar", 30 + i) for i in range(3))
    cache = NodeCache(str(tmp_path), 2 * SIZE + 10)
    with cache.file(a) as first, cache.file(b) as second:
        with pytest.raises(StorageError, match=f"held-2.tar has 1000 .*cache.max_bytes=2010 must .* {3 * SIZE}"):
            with cache.file(c):
                pass
        assert first.exists() and second.exists() and kept(cache) == {name_of(a), name_of(b)}
    with cache.file(c):
        assert name_of(a) not in kept(cache)


def test_a_damaged_object_is_refused_by_name_and_nothing_of_it_stays(s3: S3Server, tmp_path: Path) -> None:
    stored, cache = put(s3, "damaged.tar", 40), NodeCache(str(tmp_path), 10**6)
    s3.put("cache/damaged.tar", b"\x28" * (SIZE - 1) + b"?")
    for _ in range(2):
        with pytest.raises(DamagedFile, match="s3://bucket/cache/damaged.tar arrived twice with sha256"):
            with cache.file(stored):
                pass
        assert not kept(cache)
    with pytest.raises(FileNotFoundError):
        with cache.file(StoredFile(f"s3://{BUCKET}/cache/none.tar", 1, "0" * 64)):
            pass


def test_a_copy_that_was_cut_is_fetched_again(s3: S3Server, tmp_path: Path) -> None:
    stored, cache = put(s3, "cut.tar", 50), NodeCache(str(tmp_path), 10**6)
    with cache.file(stored) as path:
        pass
    os.truncate(path, 10)
    with cache.file(stored) as path:
        assert path.stat().st_size == SIZE
    assert s3.requests["GET", "cut.tar"] == 2


def test_what_a_process_that_died_had_begun_is_taken_over_and_counts_until_then(s3: S3Server, tmp_path: Path) -> None:
    a, b = put(s3, "died-0.tar", 60), put(s3, "died-1.tar", 61)
    cache = NodeCache(str(tmp_path), 2 * SIZE)
    left = cache.root() / f"{name_of(a)}.{SIZE}.part"
    left.write_bytes(b"half of it")
    with cache.file(a) as path:
        assert path.read_bytes() == b"\x3c" * SIZE and not left.exists()
    other = cache.root() / f"{'0' * 64}.tar.{2 * SIZE}.part"  # of a file that nobody asks for any more
    other.write_bytes(b"")
    with cache.file(b):
        assert not other.exists()


def test_who_waits_for_a_fetch_does_not_wait_for_those_who_read_the_file_after_it(s3: S3Server, tmp_path: Path) -> None:
    stored, cache = put(s3, "waited-for.tar", 60), NodeCache(str(tmp_path), 10**6)
    path = tmp_path / name_of(stored)
    part = path.with_name(f"{path.name}.{SIZE}.part")
    fetching = os.open(part, os.O_CREAT | os.O_RDWR)
    fcntl.flock(fetching, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.fetch, stored)
        time.sleep(0.3)  # it has opened the part
        part.write_bytes(bytes([60]) * SIZE)
        part.rename(path)
        fcntl.flock(fetching, fcntl.LOCK_SH)  # from the one who fetched to those who read, with no moment between
        try:
            assert waiting.result(30) == path
        finally:
            os.close(fetching)
    assert kept(cache) == {path.name} and s3.requests["GET", "waited-for.tar"] == 0


def test_who_reads_waits_for_what_is_fetched_ahead_and_nothing_is_fetched_ahead_meanwhile(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, ahead, also_ahead, a, b, later = (put(s3, f"wait-{i}.tar", 70 + i) for i in range(6))
    cache, download = NodeCache(str(tmp_path), 3 * SIZE), node_cache._download
    under_way, go_on = threading.Semaphore(0), threading.Event()

    def slowly(stored: StoredFile, part: Path) -> None:
        if stored in (ahead, also_ahead):
            under_way.release()
            assert go_on.wait(60)
        download(stored, part)

    def read(stored: StoredFile) -> int:
        with cache.file(stored) as path:
            return len(path.read_bytes())

    monkeypatch.setattr(node_cache, "_download", slowly)
    with cache.file(held), ThreadPoolExecutor(4) as pool:
        fetching = [pool.submit(cache.ahead, stored) for stored in (ahead, also_ahead)]
        assert under_way.acquire(timeout=60) and under_way.acquire(timeout=60)  # both have room
        reading = [pool.submit(read, stored) for stored in (a, b)]
        while not cache._somebody_waits():
            time.sleep(POLL_SECONDS)
        cache.ahead(later)
        assert not any(future.done() for future in (*fetching, *reading))
        go_on.set()
        assert [future.result(60) for future in reading] == [SIZE, SIZE]
        assert [future.result(60) for future in fetching] == [None, None]
        assert name_of(held) in kept(cache) and s3.requests["GET", "wait-5.tar"] == 0
    cache.ahead(later)
    assert name_of(later) in kept(cache) and not cache._somebody_waits()


def test_readers_are_never_refused_while_what_they_read_at_once_fits(s3: S3Server, tmp_path: Path) -> None:
    """Four read and four fetch ahead, by chance, where five files have room."""
    files, cache = [put(s3, f"tight-{i}.tar", 90 + i) for i in range(10)], NodeCache(str(tmp_path), 5 * SIZE)

    def work(number: int) -> None:
        chance = random.Random(SEED * 100 + number)
        for stored in chance.choices(files, k=15):
            if number % 2:
                cache.ahead(stored)
            else:
                with cache.file(stored) as path:
                    assert path.read_bytes()[0] == 90 + files.index(stored)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result(120)
    assert len(kept(cache)) <= 5 and all(name.endswith(".tar") for name in kept(cache))
