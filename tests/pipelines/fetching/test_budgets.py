"""How often a host is asked: moments that are handed out, one question for all threads that wait."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.fetching import budgets
from pipelines.fetching.budgets import HostBudgets, Turns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only number says."""
    now = [100.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])
    return now


def test_turns_of_a_host_lie_apart_whoever_asks_and_hosts_do_not_wait_for_each_other(clock: list[float]) -> None:
    shared = HostBudgets()
    assert shared.ask({"a.test": 2, "b.test": 1}, 4.0) == {"a.test": [0.0, 0.25], "b.test": [0.0]}
    assert shared.ask({"a.test": 1}, 4.0) == {"a.test": [0.5]} and shared.busy_seconds() == 0.75
    clock[0] += 0.6
    assert shared.ask({"a.test": 2, "b.test": 1}, 4.0) == {"a.test": [pytest.approx(0.15), pytest.approx(0.4)],
                                                            "b.test": [0.0]}  # fmt: skip
    clock[0] += 10
    assert shared.busy_seconds() < 0
    assert shared.ask({"a.test": 1}, 4.0) == {"a.test": [0.0]}, "what was not used is not saved up"


def test_hosts_that_are_free_again_are_forgotten(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "HOSTS_KEPT", 10)
    shared = HostBudgets()
    for i in range(100):
        clock[0] += 0.1
        shared.ask({f"{i}.test": 1}, 1.0)
    assert len(shared.free_at) <= 11
    assert shared.ask({"99.test": 1}, 1.0) == {"99.test": [pytest.approx(1.0)]}, "those that are not are kept"


def test_threads_that_wait_at_once_are_asked_for_together() -> None:
    questions, first_is_asked, go_on = [], threading.Event(), threading.Event()

    def ask(asked: dict[str, int], per_second: float) -> dict[str, list[float]]:
        questions.append(asked)
        first_is_asked.set()
        go_on.wait()
        return {host: [0.0] * requests for host, requests in asked.items()}

    turns = Turns(ask, 1000.0)
    with ThreadPoolExecutor(9) as pool:
        waits = [pool.submit(turns.wait, "a.test")]
        first_is_asked.wait()
        waits += [pool.submit(turns.wait, f"{i % 2}.test") for i in range(8)]
        while len(turns.waiting) < 8:
            time.sleep(0.001)
        go_on.set()
        assert all(wait.result() >= 0 for wait in waits)
    assert questions == [{"a.test": 1}, {"0.test": 4, "1.test": 4}]


def test_an_error_is_heard_by_all_who_wait() -> None:
    def ask(asked: dict[str, int], per_second: float) -> dict[str, list[float]]:
        raise ConnectionError("nobody answers")

    turns = Turns(ask, 1.0)
    with ThreadPoolExecutor(4) as pool:
        for wait in [pool.submit(turns.wait, "a.test") for _ in range(4)]:
            with pytest.raises(ConnectionError, match="nobody answers"):
                wait.result()
