"""A real S3 server for tests: moto behind HTTP on loopback, which can be told to fail, to lie, and to count."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

BUCKET = "bucket"
VARIABLES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
Answer = Iterable[bytes]


class S3Server:
    """`requests` counts (method, object's name); `refuse`, `spoil` and `cut` are asked about every one of them."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.refuse: Callable[[str, str], bool] = lambda method, name: False  # -> 503
        self.spoil: Callable[[str, str], bool] = lambda method, name: False  # -> another byte at the end
        self.cut: Callable[[str, str], bool] = lambda method, name: False  # -> half of what its header promises
        self.url, self.moto = "", cast(Any, None)
        self._writing = threading.Lock()  # moto looks and writes in two steps; S3 does both at once

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        method, name = environ["REQUEST_METHOD"], environ["PATH_INFO"].rpartition("/")[2]
        self.requests[method, name] += 1
        if not environ.get("wsgi.input_terminated"):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        if self.refuse(method, name):
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if method != "GET":
            with self._writing:
                return list(self.moto(environ, start_response))
        body = b"".join(self.moto(environ, start_response))
        if self.cut(method, name):
            return [body[: len(body) // 2]]
        return [body[:-1] + bytes([body[-1] ^ 1]) if body and self.spoil(method, name) else body]

    def put(self, key: str, data: bytes) -> None:
        """An object put behind everybody's back."""
        self.client().put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_folder(self, folder: Path, key: str) -> None:
        """All files of a folder as objects below a key."""
        client = self.client()
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=BUCKET, Key=f"{key}/{path.relative_to(folder)}", Body=path.read_bytes())

    def keys(self, prefix: str = "") -> list[str]:
        answer = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for found in answer.get("Contents", [])]

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1",
                            aws_access_key_id="test", aws_secret_access_key="test")


@contextmanager
def serving() -> Iterator[S3Server]:
    """A server with an empty bucket; the environment, which processes inherit, points at it meanwhile."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from s3fs import S3FileSystem
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    server = S3Server()
    server.moto = DomainDispatcherApplication(create_backend_app)
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    S3FileSystem.clear_instance_cache()  # it would go on asking the server before this one
    server.url = f"http://127.0.0.1:{http.server_port}"
    before = {name: os.environ.get(name) for name in (*VARIABLES, "AWS_ENDPOINT_URL")}
    os.environ.update(VARIABLES, AWS_ENDPOINT_URL=server.url)
    try:
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        http.shutdown()
        thread.join()
        http.server_close()
        _reset_moto()


def _reset_moto() -> None:
    """moto keeps what it holds in the process; the next server shall begin empty."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    s3_backends[DEFAULT_ACCOUNT_ID]["global"].reset()
