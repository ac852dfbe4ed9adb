"""Places: a path on disk, or an object on S3. The one file that knows fsspec.

    place("outputs/run")          -> pathlib.Path
    place("s3://bucket/outputs")  -> upath.UPath, which answers to the same names: /, exists(), read_bytes(), glob()

On S3 nothing is renamed: a put is the atomic step, and a reader sees all of an object or nothing. Credentials and
endpoint come from where every AWS tool looks for them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, the machine's
role). Calls that a busy or broken server refuses are tried again by botocore and s3fs; what fails for good raises
StorageError naming the object.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

PAGE = 1000  # keys that S3 lists in one answer
# Of the first look at a place: work under way waits and asks again for longer, but who has just begun wants to know.
FIRST_LOOK = {"connect_timeout": 4, "read_timeout": 8, "retries": {"total_max_attempts": 2}}


class StorageError(OSError):
    """An object store did not do what it was asked; the message names the object and what to look at."""


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

    return UPath(where.rstrip("/"), use_listings_cache=False)


@contextmanager
def explained(path: Any) -> Iterator[None]:
    """Turns what botocore and s3fs raise into StorageError with the object's name; absence stays FileNotFoundError."""
    from botocore.exceptions import BotoCoreError, HTTPClientError, NoCredentialsError
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
    store.retries = 1  # s3fs asks again what botocore has asked again
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
    with explained(path):
        return path.fs.cat_file(path.path)


def put(path: Any, data: bytes) -> None:
    """Puts an object: a reader sees all of it or what was there before."""
    with explained(path):
        path.fs.pipe_file(path.path, data)


def put_file(local: Path, path: Any) -> None:
    """Puts a file as an object; in parts where it is large, which become an object together."""
    with explained(path):
        path.fs.put_file(str(local), path.path)


def get_file(path: Any, local: Path) -> None:
    """Fetches an object into a file."""
    with explained(path):
        path.fs.get_file(path.path, str(local))


def read_many(paths: list[Any]) -> list[bytes]:
    """What objects hold, many asked for at once."""
    if not paths:
        return []
    with explained(paths[0].parent):
        found = paths[0].fs.cat([path.path for path in paths])
    return [found[path.path] for path in paths]


def sizes(folder: Any) -> dict[str, int]:
    """Bytes of every object below a folder, by its name there; a thousand in one answer."""
    start = len(folder.path.rstrip("/")) + 1
    with explained(folder):
        found = folder.fs.find(folder.path, detail=True)
    return {name[start:]: info["size"] for name, info in found.items()}


def remove(paths: list[Any]) -> None:
    """Removes objects; those that are not there are no error."""
    for start in range(0, len(paths), PAGE):
        page = paths[start : start + PAGE]
        keys = [{"Key": _names(path)["Key"]} for path in page]
        with explained(page[0]):
            answer = page[0].fs.call_s3(
                "delete_objects", Bucket=_names(page[0])["Bucket"], Delete={"Objects": keys, "Quiet": True}
            )
        if errors := answer.get("Errors"):
            raise StorageError(f"{page[0].parent}: {len(errors)} objects were not removed, first {errors[0]}")


def abort_uploads(folder: Any) -> int:
    """Ends uploads in parts below a folder that nobody finished, which would be kept and paid for. Returns how many."""
    names, ended = _names(folder, prefix=True), 0
    with explained(folder):
        while uploads := folder.fs.call_s3("list_multipart_uploads", **names).get("Uploads"):
            for upload in uploads:
                folder.fs.call_s3(
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
            return path.fs.call_s3("put_object", **_names(path), Body=data, **condition)["ETag"]
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
            answer = path.fs.call_s3("get_object", **_names(path))
            data = sync(path.fs.loop, answer["Body"].read)
    except FileNotFoundError:
        return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Look(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())


def _names(path: Any, prefix: bool = False) -> dict[str, str]:
    bucket, _, key = path.path.partition("/")
    return {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/"} if prefix else {"Bucket": bucket, "Key": key}


# -- files on disk ----------------------------------------------------------------------------------------------------
def sha256_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
