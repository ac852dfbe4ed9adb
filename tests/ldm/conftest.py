"""An object store for tests of what reads from one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_server import S3Server, serving


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serving() as server:
        yield server
