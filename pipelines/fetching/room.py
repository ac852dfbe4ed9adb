"""How much memory the bodies of one process take at once, however many come and however long they turn out to be.

The first piece of every body is free: a few hundred of them are little. One that grows beyond it asks once for all that
it may still need, and waits until as much is free, first come, first served. Who holds room never waits for more, so
that all come through.
"""

from __future__ import annotations

import threading
import time
from collections import deque

SMALL_BYTES = 1 << 19  # of a body, the first piece


class Room:
    """Bytes that large bodies may take together."""

    def __init__(self, size: int) -> None:
        self.size = self.left = size
        self.waiting: deque[object] = deque()
        self.changed = threading.Condition()

    def take(self, size: int) -> None:
        """Waits until so many bytes are free and it is one's turn. Raises ValueError for more than there ever are."""
        if size > self.size:
            raise ValueError(f"a body of {size} bytes never fits into a room of {self.size}")
        turn = object()
        with self.changed:
            self.waiting.append(turn)
            self.changed.wait_for(lambda: self.waiting[0] is turn and self.left >= size)
            self.waiting.popleft()
            self.left -= size
            self.changed.notify_all()

    def give(self, size: int) -> None:
        with self.changed:
            self.left += size
            self.changed.notify_all()


class Share:
    """What one body holds of a room."""

    def __init__(self, room: Room) -> None:
        self.room, self.held = room, 0

    def take(self, size: int) -> float:
        """Takes room for a body of so many bytes at most; returns the seconds that this took."""
        begun = time.monotonic()
        self.room.take(size)
        self.held += size
        return time.monotonic() - begun

    def keep(self, size: int) -> None:
        """Gives back what a body did not need that came to this size."""
        if self.held > size:
            self.room.give(self.held - size)
            self.held = size

    def free(self) -> None:
        self.keep(0)


class Body:
    """A file that came, as a stream that is read whole; it takes its room until it is closed or forgotten."""

    def __init__(self, data: bytes | memoryview, share: Share) -> None:
        self.data, self.share = data, share

    def seek(self, position: int) -> None:
        """Nothing: it is read whole."""

    def getvalue(self) -> bytes:
        return bytes(self.data)

    def close(self) -> None:
        self.data = b""
        self.share.free()

    __del__ = close
