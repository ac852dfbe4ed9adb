"""One MLflow database for all tests that need one."""

from __future__ import annotations

import pytest

from tests.pipelines.mlflow_server import client


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite database with its tables, because making them takes seconds; every test has its own runs in it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    uri = f"sqlite:///{path}"
    client(uri).create_experiment("test", artifact_location=(path.parent / "artifacts").as_uri())
    return uri
