import threading
import time

import pytest

from foreshock.records import record_queue
from foreshock.records.record_queue import RecordQueue


def contents(queue):
    return queue.close_and_empty()


def test_items_come_out_in_the_order_they_went_in():
    queue = RecordQueue(10)
    for number in range(8):
        queue.put(number, is_event=number % 3 == 0)
    queue.close()
    assert [queue.take() for _ in range(9)] == [*range(8), None]


def test_new_telemetry_displaces_the_oldest():
    queue = RecordQueue(3)
    lost = [queue.put(number, is_event=False) for number in range(5)]
    assert [reason is not None for reason in lost] == [False, False, False, True, True]
    assert contents(queue) == [2, 3, 4]


def test_event_displaces_the_oldest_telemetry_never_an_event():
    queue = RecordQueue(3)
    for number, is_event in enumerate([True, False, False, True, True, True]):
        queue.put(number, is_event=is_event)
    assert contents(queue) == [0, 3, 4, 5]


def test_telemetry_is_refused_when_only_events_wait():
    queue = RecordQueue(1)
    assert queue.put("event", is_event=True) is None
    assert queue.put("telemetry", is_event=False) is not None
    assert contents(queue) == ["event"]


def test_events_are_bounded_too(monkeypatch):
    monkeypatch.setattr(record_queue, "MAX_EVENTS", 5)
    queue = RecordQueue(2)
    lost = [queue.put(number, is_event=True) is not None for number in range(7)]
    assert lost == [False] * 5 + [True] * 2
    assert contents(queue) == [0, 1, 2, 3, 4]


def test_mark_is_neither_refused_nor_displaced():
    queue = RecordQueue(1)
    queue.put("old", is_event=False)
    assert queue.put_mark("mark")
    queue.put("new", is_event=False)
    assert contents(queue) == ["mark", "new"]


def test_closed_queue_takes_nothing_more():
    queue = RecordQueue(3)
    queue.close()
    assert queue.put(1, is_event=True) is not None
    assert not queue.put_mark(2)
    assert queue.take() is None


def start_taker(queue):
    taken = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()), daemon=True)
    taker.start()
    while not queue._is_taker_waiting:
        time.sleep(0.001)
    return taker, taken


@pytest.mark.parametrize(
    ("wake", "item"),
    [
        (lambda queue: queue.put(1, is_event=True), 1),
        (lambda queue: queue.put_mark(1), 1),
        (lambda queue: [queue.put(number, is_event=False) for number in range(5)], 0),
        (lambda queue: queue.close(), None),
    ],
    ids=["event", "mark", "half full", "close"],
)
def test_what_presses_wakes_the_taker(monkeypatch, wake, item):
    monkeypatch.setattr(record_queue, "POLL_INTERVAL_S", 1000)
    queue = RecordQueue(10)
    taker, taken = start_taker(queue)
    wake(queue)
    taker.join(10)
    assert taken == [item]


def test_telemetry_wakes_nobody_but_is_taken_in_time(monkeypatch):
    queue = RecordQueue(10)
    monkeypatch.setattr(queue._changed, "notify", lambda: pytest.fail("woken"))
    taker, taken = start_taker(queue)
    queue.put(1, is_event=False)
    taker.join(10)
    assert taken == [1]
