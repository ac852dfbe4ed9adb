"""A busy object store is borne, one that is gone is named soon, and what it sends is whole or asked for again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm import storage
from ldm.storage import BadAnswer, StorageError, place
from tests.s3_server import BUCKET, S3Server

HOME = f"s3://{BUCKET}/storage"
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "GET": lambda path, local: storage.read(path),
    "GET, to a file": lambda path, local: storage.get_file(path, local),
    "GET, many": lambda path, local: storage.read_many([path]),
    "GET, with its age": lambda path, local: storage.look(path),
    "HEAD": lambda path, local: storage.exists(path),
    "PUT": lambda path, local: storage.put(path, b"x"),
    "PUT, if it is new": lambda path, local: storage.create(path, b"x"),
}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore waits a random share of 1, 2, 4 and 8 seconds; here none of it."""
    monkeypatch.setattr("random.random", lambda: 0.0)


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_busy_is_asked_again_and_one_that_stays_so_is_given_up(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None, call: str
) -> None:
    method, name = call.partition(",")[0], f"{call.replace(', ', '-').replace(' ', '-')}.txt"
    path = place(f"{HOME}/{name}")
    if method != "PUT":
        s3.put(f"storage/{name}", b"held")
    attempts = storage.PATIENCE["retries"]["total_max_attempts"]
    asked: list[str] = []

    def busy(times: int) -> None:
        asked.clear()
        monkeypatch.setattr(s3, "refuse", lambda verb, at: at == name and asked.append(verb) is None
                            and len(asked) <= times)  # fmt: skip

    busy(attempts - 1)
    CALLS[call](path, tmp_path / "local")
    assert asked == [method] * attempts
    busy(1000)
    with pytest.raises(StorageError, match=HOME):
        CALLS[call](path, tmp_path / "local")
    assert asked == [method] * attempts, "neither s3fs nor we ask again what botocore has asked again"


def test_what_a_path_asks_by_itself_is_bounded_too(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    monkeypatch.setattr(s3, "refuse", lambda method, name: name == "by-itself.txt")
    with pytest.raises(OSError):
        place(f"{HOME}/by-itself.txt").exists()
    assert s3.requests["HEAD", "by-itself.txt"] == storage.PATIENCE["retries"]["total_max_attempts"]


def test_a_store_that_falls_silent_is_named_after_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    patience = storage.PATIENCE
    attempts, pauses = patience["retries"]["total_max_attempts"], 1 + 2 + 4 + 8
    assert attempts * max(patience["read_timeout"], patience["connect_timeout"]) + pauses <= 65
    monkeypatch.setitem(patience, "read_timeout", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        held: list[socket.socket] = []
        threading.Thread(target=_accept, args=(listener, held), daemon=True).start()
        with pytest.raises(StorageError, match=f"silent/x.txt: .*AWS_ENDPOINT_URL={address}"):
            storage.get_file(place("s3://bucket/silent/x.txt"), tmp_path / "x")
        assert len(held) == attempts
    for connection in held:
        connection.close()


def _accept(listener: socket.socket, held: list[socket.socket]) -> None:
    while True:
        try:
            held.append(listener.accept()[0])
        except OSError:
            return


@pytest.mark.parametrize("wrong", ["spoil", "cut"])
@pytest.mark.parametrize("call", ["GET", "GET, to a file", "GET, many"])
def test_what_arrives_cut_off_or_damaged_is_asked_for_once_more(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None, wrong: str, call: str
) -> None:
    name = f"{wrong}-{call.replace(', ', '-').replace(' ', '-')}.txt"
    path, local = place(f"{HOME}/{name}"), tmp_path / "local"
    storage.put(path, b"all of this and nothing else")
    monkeypatch.setattr(s3, wrong, lambda method, at: (method, at) == ("GET", name) and s3.requests["GET", at] == 1)
    came = CALLS[call](path, local)
    assert (came[0] if call == "GET, many" else came or local.read_bytes()) == b"all of this and nothing else"
    assert s3.requests["GET", name] == 2
    monkeypatch.setattr(s3, wrong, lambda method, at: (method, at) == ("GET", name))
    with pytest.raises(BadAnswer, match="cut off or damaged"):
        CALLS[call](path, local)


@pytest.mark.parametrize("pattern, fits", [
    ("a/*.parquet", ["a/part-1.parquet", "a/part-10.parquet", "a/part-2.parquet"]),
    ("a/part-?.*", ["a/part-1.parquet", "a/part-2.parquet", "a/part-3.tsv"]),
    ("a/part-[23].*", ["a/part-2.parquet", "a/part-3.tsv"]),
    ("a/*/*.parquet", ["a/b/part-4.parquet"]),
    ("*/part-1.parquet", ["a/part-1.parquet"]),
    ("a/part-1.parquet", ["a/part-1.parquet"]),
    ("a/part-1", []), ("a", []), ("A/*", []), ("a/b/*.tsv", []),
])  # fmt: skip
def test_a_glob_fits_what_it_fits_on_disk(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, fits: list[str]
) -> None:
    monkeypatch.setattr(storage, "PAGE", 2)  # a listing comes in pieces
    names = ["a/part-1.parquet", "a/part-2.parquet", "a/part-10.parquet", "a/part-3.tsv", "a/b/part-4.parquet", "ab/x"]
    for size, name in enumerate(names):
        s3.put(f"globs/{name}", bytes(size))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert storage.matching(f"s3://{BUCKET}/globs/{pattern}") == {
        f"s3://{BUCKET}/globs/{name}": names.index(name) for name in fits
    }
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(pattern) if path.is_file()) == fits


def test_sizes_are_those_of_all_objects_below_a_folder(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAGE", 2)
    expected = {f"{i}.tar": i for i in range(5)} | {"below/6.tar": 6}
    for name, size in expected.items():
        s3.put(f"sizes/{name}", bytes(size))
    s3.put("sizes-of-others/x", b"x")
    s3.put("sizes/made-by-a-browser/", b"")
    assert storage.sizes(place(f"s3://{BUCKET}/sizes")) == expected
    assert storage.sizes(place(f"s3://{BUCKET}"))["sizes/below/6.tar"] == 6
    assert storage.exists(place(f"s3://{BUCKET}/sizes/0.tar")) and not storage.exists(place(f"s3://{BUCKET}/sizes"))
