"""What an object store does that no disk does: it refuses, it answers wrongly, it keeps half an upload."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from ldm import storage
from ldm.node_cache import DamagedFile, NodeCache
from ldm.storage import StorageError, check, place
from pipelines.bucket import Bucket
from tests.pipelines.test_manifest import commit
from tests.s3_server import BUCKET, S3Server


@pytest.fixture
def folder(s3: S3Server, tmp_path: Path) -> Bucket:
    return Bucket(f"s3://{BUCKET}/{tmp_path.name}/download", "download", NodeCache(str(tmp_path), 10**9))


def test_a_put_that_is_refused_twice_is_tried_again(
    s3: S3Server, folder: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "refuse", lambda method, name: method == "PUT" and s3.requests[method, name] <= 2)
    assert commit(folder, 3) == folder.record(3)
    assert s3.requests["PUT", "000003.tar"] == 3


def test_a_put_that_fails_for_good_fails_the_shard_by_name_and_leaves_no_record(
    s3: S3Server, folder: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "refuse", lambda method, name: method == "PUT" and name == "000004.tar")
    with pytest.raises(StorageError, match="download/000004.tar"):
        commit(folder, 4)
    assert folder.record(4) is None


def test_what_arrives_wrong_is_fetched_again_and_refused_by_name_when_it_stays_wrong(
    s3: S3Server, folder: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(folder, 5)
    monkeypatch.setattr(s3, "spoil", lambda method, name: name == "000005.tar" and s3.requests["GET", name] == 1)
    assert folder.data("000005.tar").read_bytes() == b"picture"
    assert s3.requests["GET", "000005.tar"] == 2
    commit(folder, 6, b"other picture")
    s3.put(str(folder.path / "000006.tar").removeprefix(f"s3://{BUCKET}/"), b"0ther picture")
    with pytest.raises(DamagedFile, match="download/000006.tar arrived twice"):
        folder.data("000006.tar")


def test_sweeping_ends_unfinished_uploads_of_this_stage_only(s3: S3Server, folder: Bucket) -> None:
    keys = [str(folder.path / "000007.tar"), str(folder.path.parent / "download2/000007.tar")]
    for key in keys:
        s3.client().create_multipart_upload(Bucket=BUCKET, Key=key.removeprefix(f"s3://{BUCKET}/"))
    assert folder.sweep() == 1
    left = s3.client().list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert ["download2" in upload["Key"] for upload in left] == [True]


def test_no_bucket_and_no_credentials_name_the_setting(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="paths.shards=s3://nowhere/x: .*no such bucket"):
        check(place("s3://nowhere/x"), "paths.shards")
    check(place(f"s3://{BUCKET}/x"), "paths.shards")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    path = place(f"s3://{BUCKET}/x")
    path.fs.clear_instance_cache()  # it has logged in already
    with pytest.raises(StorageError, match="paths.shards=s3://bucket/x: .*AWS_ACCESS_KEY_ID"):
        check(place(f"s3://{BUCKET}/x"), "paths.shards")


@pytest.mark.parametrize("silent, word", [(False, "Could not connect to"), (True, "timeout on")])
def test_a_server_that_is_dead_or_silent_is_named_within_seconds(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, silent: bool, word: str
) -> None:
    monkeypatch.setitem(storage.FIRST_LOOK, "read_timeout", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if silent:
            listener.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        begun = time.monotonic()
        with pytest.raises(StorageError, match=f"(?s)paths.shards=s3://bucket/x: .*{word}.*AWS_ENDPOINT_URL={address}"):
            check(place(f"s3://{BUCKET}/x"), "paths.shards")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("where", ["gopher://x/y", "gs://bucket/prefix"])
def test_another_kind_of_place_is_refused(where: str) -> None:
    kind = where.partition("://")[0]
    with pytest.raises(StorageError, match=f"{where}: {kind}:// is not supported; expected a path .*s3://"):
        place(where)
