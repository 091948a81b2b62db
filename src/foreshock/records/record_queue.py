"""The queue between the training loop, which must not wait, and the thread that writes."""

import threading
from collections import deque
from typing import Generic, NamedTuple, TypeVar

# Far above what any run has of them (skips, rollbacks); only so that no bug can fill the memory.
MAX_EVENTS = 65_536
# How long telemetry may lie in the queue. Its arrival wakes nobody: on a busy machine the thread
# that is woken takes the core of the one that wakes it, which costs a step milliseconds.
POLL_INTERVAL_S = 0.2

T = TypeVar("T")


class Loss(NamedTuple):
    """What putting an item in has cost.

    Attributes:
        reason: why something was lost.
        is_item: whether it was the item itself; else the oldest telemetry gave way to it.
    """

    reason: str
    is_item: bool


class RecordQueue(Generic[T]):
    """A bounded first-in-first-out queue of telemetry, which may be lost, and events, which count.

    When it is full the oldest telemetry gives way, to new telemetry as to an event. Events are
    refused only beyond 65536 of them. An event is taken at once, telemetry within a fifth of a
    second, or when half of the room is used up.

    Args:
        capacity: how many items are held before telemetry is lost.

    Cost: putting in and taking out take constant time, full or not.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Two queues, so that the oldest telemetry is found at once; numbers keep their order.
        self._telemetry: deque[tuple[int, T]] = deque()
        self._events: deque[tuple[int, T]] = deque()
        self._next_number = 0
        self._is_closed = False
        self._is_taker_waiting = False
        # Its lock is reentrant: a signal handler that writes may interrupt a write.
        self._changed = threading.Condition()

    def put(self, item: T, *, is_event: bool) -> Loss | None:
        """Puts an item in, never waiting for room.

        Args:
            item: what `take` will give.
            is_event: whether it must not be lost for want of room.

        Returns:
            None if nothing was lost, else which item was, this one or the oldest telemetry.
        """
        with self._changed:
            if self._is_closed:
                return Loss("the writer is closed", is_item=True)
            lost = None
            if len(self._telemetry) + len(self._events) >= self._capacity:
                if self._telemetry:
                    self._telemetry.popleft()
                    reason = f"more than {self._capacity} records wait to be written"
                    lost = Loss(reason, is_item=False)
                elif not is_event or len(self._events) >= MAX_EVENTS:
                    reason = f"more than {len(self._events)} events wait to be written"
                    return Loss(reason, is_item=True)
            self._append(item, self._events if is_event else self._telemetry)
            return lost

    def put_mark(self, item: T) -> bool:
        """Puts an item in behind all others; it takes no room and is never lost.

        Args:
            item: what `take` will give.

        Returns:
            False if the queue is closed, so that the item will not be taken.
        """
        with self._changed:
            if not self._is_closed:
                self._append(item, self._events)
            return not self._is_closed

    def take(self) -> T | None:
        """Waits for the oldest item and takes it out. For one thread.

        Returns:
            The item; None once the queue is closed and empty.
        """
        with self._changed:
            while not (self._telemetry or self._events):
                if self._is_closed:
                    return None
                self._is_taker_waiting = True
                self._changed.wait(POLL_INTERVAL_S)
            return self._oldest().popleft()[1]

    def close(self) -> None:
        """Refuses items from now on; those inside can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close_and_empty(self) -> list[T]:
        """Refuses items from now on, and gives up those inside.

        Returns:
            What was inside, oldest first.
        """
        with self._changed:
            self.close()
            given_up = sorted([*self._telemetry, *self._events], key=lambda entry: entry[0])
            self._telemetry.clear()
            self._events.clear()
        return [item for _, item in given_up]

    def _append(self, item: T, queue: deque[tuple[int, T]]) -> None:
        queue.append((self._next_number, item))
        self._next_number += 1
        is_pressing = queue is self._events or 2 * len(queue) >= self._capacity
        if is_pressing and self._is_taker_waiting:
            # Cleared first, so that a handler which interrupts this does not notify once more.
            self._is_taker_waiting = False
            self._changed.notify()

    def _oldest(self) -> deque[tuple[int, T]]:
        if not self._events:
            return self._telemetry
        if not self._telemetry or self._events[0][0] < self._telemetry[0][0]:
            return self._events
        return self._telemetry
