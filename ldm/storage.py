"""Places: a path on disk, or an object on S3. The one file that knows fsspec.

    place("outputs/run")          -> pathlib.Path
    place("s3://bucket/outputs")  -> upath.UPath, which answers to the same names: /, exists(), read_bytes(), glob()

On S3 nothing is renamed: a put is the atomic step, and a reader sees all of an object or nothing. Credentials and
endpoint come from where every AWS tool looks for them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, the machine's
role). Calls that a busy or broken server refuses are tried again as PATIENCE says; what fails for good raises
StorageError naming the object.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PAGE = 1000  # keys that S3 lists, or removes, in one answer
# Of every call: seconds that an answer is waited for, and how often silence and refusals (503 SlowDown, say) are asked
# again, after pauses of up to 1, 2, 4 and 8 seconds. A busy store is borne, a dead one named within about a minute. The
# mode is botocore's oldest: its others stop asking again once a hundred calls have been refused at the same time.
PATIENCE = {"connect_timeout": 5, "read_timeout": 10, "retries": {"mode": "legacy", "total_max_attempts": 5},
            "max_pool_connections": 50}  # fmt: skip
# Of the first look at a place: work under way waits and asks again for longer, but who has just begun wants to know.
FIRST_LOOK = {"connect_timeout": 4, "read_timeout": 8, "retries": {"total_max_attempts": 2}}


class StorageError(OSError):
    """An object store did not do what it was asked; the message names the object and what to look at."""


class BadAnswer(StorageError):
    """What a store sent was cut off, or is not what its own checksum says."""


@dataclass(frozen=True)
class StoredFile:
    """A file that somebody wrote and described: where it lies, and what must arrive."""

    place: str  # path or URL
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Look:
    """An object as it was at one moment."""

    data: bytes
    version: str  # changes with every put of other bytes
    age: float  # seconds since it was put, by the server's own clock


def is_remote(path: Any) -> bool:
    """Whether a place is on an object store."""
    return "://" in path if isinstance(path, str) else not isinstance(path, Path)


def place(where: Any) -> Any:
    """A Path, or for s3://bucket/key a UPath that never answers from an old listing."""
    if not is_remote(where):
        return Path(where)
    if not isinstance(where, str):
        return where
    if not where.startswith("s3://"):
        kind = where.partition("://")[0]
        raise StorageError(
            f"{where}: {kind}:// is not supported; expected a path that all nodes share, or s3://bucket/prefix "
            f"(also of other stores that speak S3, by AWS_ENDPOINT_URL)"
        )
    from upath import UPath

    path = UPath(where.rstrip("/"), use_listings_cache=False, config_kwargs=PATIENCE)
    _store(path)
    return path


def _store(path: Any) -> Any:
    """The client of a place's store; all paths of the process share it."""
    store = path.fs
    store.retries = 1  # or s3fs would ask again, up to 25 times, for all that botocore has asked again
    return store


@contextmanager
def explained(path: Any) -> Iterator[None]:
    """Turns what botocore and s3fs raise into StorageError with the object's name; absence stays FileNotFoundError."""
    from aiohttp import ClientPayloadError
    from botocore.exceptions import (
        BotoCoreError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        NoCredentialsError,
        ResponseStreamingError,
    )
    from botocore.exceptions import ConnectionError as NoConnection

    try:
        yield
    except NoCredentialsError as error:
        raise StorageError(
            f"{path}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or "
            f"give the machines a role"
        ) from error
    except FileNotFoundError as error:
        if "bucket does not exist" not in str(error):
            raise
        raise StorageError(f"{path}: there is no such bucket; make it, or name another one") from error
    except StorageError:
        raise
    except (ClientPayloadError, FlexibleChecksumError, IncompleteReadError, ResponseStreamingError) as error:
        raise BadAnswer(f"{path}: the answer was cut off or damaged: {error}") from error
    except (HTTPClientError, NoConnection) as error:
        raise StorageError(
            f"{path}: {error}. Does the server run, can this machine reach it, and is AWS_ENDPOINT_URL="
            f"{os.environ.get('AWS_ENDPOINT_URL', 'unset, which is Amazon')} the right one?"
        ) from error
    except (BotoCoreError, OSError) as error:
        raise StorageError(f"{path}: {error}") from error


def check(path: Any, setting: str) -> None:
    """Raises StorageError that names the setting when a place on an object store cannot be used; within seconds."""
    if not is_remote(path):
        return
    store = type(path.fs)(config_kwargs=FIRST_LOOK, skip_instance_cache=True)
    store.retries = 1
    try:
        with explained(path):
            store.call_s3("list_objects_v2", **_names(path, prefix=True), MaxKeys=1)
    except OSError as error:
        raise StorageError(f"{setting}={path}: {error}") from error


# -- whole objects ----------------------------------------------------------------------------------------------------
def read(path: Any) -> bytes:
    """All that a file or an object holds, as it was at one moment. Raises FileNotFoundError."""
    path = place(path)
    if not is_remote(path):
        return path.read_bytes()
    return _whole(path, lambda: _store(path).cat_file(path.path, max_concurrency=1))  # one request, whatever the size


def _whole(path: Any, fetch: Callable[[], T]) -> T:
    """What is fetched; what arrives cut off or damaged is asked for once more."""
    try:
        with explained(path):
            return fetch()
    except BadAnswer:
        with explained(path):
            return fetch()


def exists(path: Any) -> bool:
    """Whether there is a file or an object."""
    if not is_remote(path):
        return path.is_file()
    try:
        with explained(path):
            _store(path).call_s3("head_object", **_names(path))
    except FileNotFoundError:
        return False
    return True


def put(path: Any, data: bytes) -> None:
    """Puts an object: a reader sees all of it or what was there before."""
    with explained(path):
        _store(path).pipe_file(path.path, data)


def put_file(local: Path, path: Any) -> None:
    """Puts a file as an object; in parts where it is large, which become an object together."""
    with explained(path):
        _store(path).put_file(str(local), path.path)


def get_file(path: Any, local: Path) -> None:
    """Fetches an object into a file."""
    _whole(path, lambda: _store(path).get_file(path.path, str(local)))


def read_many(paths: list[Any]) -> list[bytes]:
    """What objects hold, many asked for at once."""
    if not paths:
        return []
    names = [path.path for path in paths]
    found = _whole(paths[0].parent, lambda: _store(paths[0]).cat(names, max_concurrency=1))
    return [found[name] for name in names]


# -- listings ---------------------------------------------------------------------------------------------------------
def sizes(folder: Any) -> dict[str, int]:
    """Bytes of every object below a folder, by its name there."""
    names = _names(folder, prefix=True)
    start = len(names["Prefix"])
    return {key[start:]: size for key, size in _listed(folder, names) if not key.endswith("/")}


def matching(pattern: str) -> dict[str, int]:
    """Bytes of every object that a glob fits, by its address, in order. As on disk, `*` ends at a slash."""
    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    begins = re.split(r"[*?[]", key, maxsplit=1)[0]
    names = {"Bucket": bucket, "Prefix": begins}
    if "/" not in key[len(begins) :]:
        names["Delimiter"] = "/"  # what lies in folders below is not even listed
    wanted = key.split("/")
    found = {f"s3://{bucket}/{name}": size for name, size in _listed(place(pattern), names) if _fits(name, wanted)}
    return dict(sorted(found.items()))


def _fits(key: str, wanted: list[str]) -> bool:
    parts = key.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _listed(path: Any, names: dict[str, str]) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the objects that a request names; a thousand in one answer."""
    while True:
        with explained(path):
            answer = _store(path).call_s3("list_objects_v2", **names, MaxKeys=PAGE)
        yield from ((found["Key"], found["Size"]) for found in answer.get("Contents", ()))
        if not answer["IsTruncated"]:
            return
        names = {**names, "ContinuationToken": answer["NextContinuationToken"]}


# -- removal ----------------------------------------------------------------------------------------------------------
def remove(paths: list[Any]) -> None:
    """Removes objects; those that are not there are no error."""
    for start in range(0, len(paths), PAGE):
        page = paths[start : start + PAGE]
        keys = [{"Key": _names(path)["Key"]} for path in page]
        with explained(page[0]):
            answer = _store(page[0]).call_s3(
                "delete_objects", Bucket=_names(page[0])["Bucket"], Delete={"Objects": keys, "Quiet": True}
            )
        if errors := answer.get("Errors"):
            raise StorageError(f"{page[0].parent}: {len(errors)} objects were not removed, first {errors[0]}")


def abort_uploads(folder: Any) -> int:
    """Ends uploads in parts below a folder that nobody finished, which would be kept and paid for. Returns how many."""
    names, ended = _names(folder, prefix=True), 0
    with explained(folder):
        while uploads := _store(folder).call_s3("list_multipart_uploads", **names).get("Uploads"):
            for upload in uploads:
                _store(folder).call_s3(
                    "abort_multipart_upload", Bucket=names["Bucket"], Key=upload["Key"], UploadId=upload["UploadId"]
                )
            ended += len(uploads)
    return ended


# -- one winner -------------------------------------------------------------------------------------------------------
def create(path: Any, data: bytes) -> str | None:
    """Puts an object that must not be there yet (If-None-Match); returns its version, or None when it is there."""
    return _put_if(path, data, IfNoneMatch="*")


def replace(path: Any, data: bytes, version: str) -> str | None:
    """Puts an object in place of that very version (If-Match); returns the new version, or None when it is gone."""
    return _put_if(path, data, IfMatch=version)


def _put_if(path: Any, data: bytes, **condition: str) -> str | None:
    """A put with a condition has one winner. A winner who did not hear of it, and asked again, still is one."""
    try:
        with explained(path):
            return _store(path).call_s3("put_object", **_names(path), Body=data, **condition)["ETag"]
    except (StorageError, FileNotFoundError) as error:
        if not _is_refused_condition(error):
            raise
    now = look(path)
    return now.version if now is not None and now.data == data else None


def _is_refused_condition(error: BaseException | None) -> bool:
    """Whether the store said 404, 409 or 412: the condition of a put did not hold, or another put came between."""
    while error is not None:
        answer = getattr(error, "response", {})
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (404, 409, 412):
            return answer["Error"].get("Code") != "NoSuchBucket"
        error = error.__cause__
    return False


def look(path: Any) -> Look | None:
    """What an object holds now, which version that is and how old; None when there is none."""
    from fsspec.asyn import sync

    try:
        with explained(path):
            answer = _store(path).call_s3("get_object", **_names(path))
            data = sync(path.fs.loop, answer["Body"].read)
    except FileNotFoundError:
        return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Look(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())


def _names(path: Any, prefix: bool = False) -> dict[str, str]:
    bucket, _, key = path.path.partition("/")
    if not prefix:
        return {"Bucket": bucket, "Key": key}
    return {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}


# -- files on disk ----------------------------------------------------------------------------------------------------
def sha256_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
