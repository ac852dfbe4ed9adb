"""A batch to encode is doubled while it fits and goes faster, and none is tried that would not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm import encode_sizes
from ldm.encode_sizes import Tried, best, free_in_cgroup, try_sizes


def sizes_tried(
    monkeypatch: pytest.MonkeyPatch, speed: dict[int, float], limit: int, fits: int = 2**20
) -> tuple[list[int], int]:
    """(the sizes that were tried, the one to take) where a picture takes 100 bytes beside 1000."""
    asked: list[int] = []

    def on_this_device(encoder: object, size: int, height: int, width: int) -> Tried | None:
        asked.append(size)
        return Tried(size, speed.get(size, speed[max(speed)]), 1000 + 100 * size) if size <= fits else None

    monkeypatch.setattr(encode_sizes, "_try", on_this_device)
    found = list(try_sizes(None, 32, 32, limit))
    return asked, best(found).batch_size


def test_a_batch_is_doubled_until_it_goes_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_tried(monkeypatch, {1: 10, 2: 18, 4: 30, 8: 30.5}, 10**9) == ([1, 2, 4, 8, 16], 4)


def test_what_would_take_more_than_its_share_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of 0.85 of 4500 bytes is 3825: 28 pictures, so 24 but not 32."""
    faster = {size: size for size in (1, 2, 4, 8, 16, 24)}
    assert sizes_tried(monkeypatch, faster, 4500) == ([1, 2, 4, 8, 16, 24], 24)
    assert sizes_tried(monkeypatch, faster, 3800) == ([1, 2, 4, 8, 16], 16)  # 3230: 22 pictures


def test_what_does_not_fit_although_it_should_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = {size: size for size in (1, 2, 4, 8)}
    assert sizes_tried(monkeypatch, faster, 10**9, fits=9) == ([1, 2, 4, 8, 16, 12], 8)
    assert list(try_sizes(None, 32, 32, 0))  # one is tried whatever is known
    monkeypatch.setattr(encode_sizes, "_try", lambda *given: None)
    assert list(try_sizes(None, 32, 32, 10**9)) == []


def test_the_tightest_cgroup_above_counts_without_what_is_only_cached(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("1:name=systemd:/old\n0::/pod/container\n")
    for folder, most, held in (("pod", "1000", 700), ("pod/container", "max", 600)):
        (cgroups / folder).mkdir(parents=True)
        (cgroups / folder / "memory.max").write_text(f"{most}\n")
        (cgroups / folder / "memory.current").write_text(f"{held}\n")
        (cgroups / folder / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert free_in_cgroup(proc, cgroups) == 1000 - (700 - 250)
    (cgroups / "pod/container/memory.max").write_text("500\n")
    assert free_in_cgroup(proc, cgroups) == 500 - (600 - 250)
    (proc / "self/cgroup").write_text("0::/\n")
    assert free_in_cgroup(proc, cgroups) > 10**15
