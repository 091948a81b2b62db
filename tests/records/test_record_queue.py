import threading

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


@pytest.mark.parametrize("wake", [lambda q: q.put(1, is_event=False), lambda q: q.close()])
def test_waiting_taker_is_woken(wake):
    queue = RecordQueue(3)
    taken = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()), daemon=True)
    taker.start()
    wake(queue)
    taker.join(10)
    assert taken in ([1], [None])
