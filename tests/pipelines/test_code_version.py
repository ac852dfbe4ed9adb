"""Which code made a result: known in a checkout, and no reason not to run elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.run import code_version


def test_a_run_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == "unknown"
