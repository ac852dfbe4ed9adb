"""How often a host is asked, by all workers of a cluster together: requests_per_second of the settings.

One HostBudgets serves the workers of all runs (an actor of pipelines/cluster.py) or, where there is none, a process. It
hands out moments: a request that asks for its turn is told how many seconds to wait. What the threads of a process ask
for while a question is under way goes out together with the next one, so that a worker of 64 threads asks some hundred
times a second at most, however fast its URLs come.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

HOSTS_KEPT = 100_000  # hosts after which those that are free again are forgotten
Ask = Callable[[dict[str, int], float], dict[str, list[float]]]


class HostBudgets:
    """When each host may be asked next. A host that was not asked for long is free, and need not be remembered."""

    def __init__(self) -> None:
        self.free_at: dict[str, float] = {}

    def ask(self, asked: dict[str, int], per_second: float) -> dict[str, list[float]]:
        """Host -> number of requests; returns for each of them in how many seconds it may go out."""
        now, waits = time.monotonic(), {}
        for host, requests in asked.items():
            first = max(now, self.free_at.get(host, now))
            waits[host] = [first - now + i / per_second for i in range(requests)]
            self.free_at[host] = first + requests / per_second
        if len(self.free_at) > HOSTS_KEPT:
            self.free_at = {host: at for host, at in self.free_at.items() if at > now}
        return waits

    def busy_seconds(self) -> float:
        """In how many seconds every host is free, so that all of them may be forgotten."""
        return max(self.free_at.values(), default=0.0) - time.monotonic()


class Turns:
    """Asks for the turns of a process: one question at a time, for all threads that wait meanwhile."""

    def __init__(self, ask: Ask, per_second: float) -> None:
        self.ask, self.per_second = ask, per_second
        self.waiting: list[tuple[str, Future[float]]] = []
        self.changing, self.asking = threading.Lock(), threading.Lock()

    def wait(self, host: str) -> float:
        """Sleeps until a host may be asked; returns the seconds that this took."""
        begun, answer = time.monotonic(), Future[float]()
        with self.changing:
            self.waiting.append((host, answer))
        with self.asking:
            if not answer.done():
                self._ask_for_all()
        time.sleep(answer.result())
        return time.monotonic() - begun

    def _ask_for_all(self) -> None:
        with self.changing:
            asked, self.waiting = self.waiting, []
        try:
            waits = self.ask(dict(Counter(host for host, _ in asked)), self.per_second)
        except BaseException as error:  # all who wait must hear of it
            for _, answer in asked:
                answer.set_exception(error)
            raise
        for host, answer in asked:
            answer.set_result(waits[host].pop(0))
