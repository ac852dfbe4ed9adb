"""Places to write to: what holds on disk must hold on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import BUCKET, S3Server, serving


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serving() as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty folder: on disk, then below a prefix of a bucket."""
    from ldm.storage import place

    if request.param == "disk":
        return tmp_path / "home"
    request.getfixturevalue("s3")
    return place(f"s3://{BUCKET}/{tmp_path.name}/home")
