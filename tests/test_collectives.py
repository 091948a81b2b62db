"""What is still under way when a process wants to end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from foreshock import collectives

Hold = Callable[[float], list[str]]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Has what is sent held by threads, as by gloo's, for some seconds; each says when it ends."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    send = dist.all_reduce
    threads: list[threading.Thread] = []

    def begin(seconds: float) -> list[str]:
        said: list[str] = []

        def keep(held: torch.Tensor) -> None:
            time.sleep(seconds)
            said.append("let go")

        def send_and_hold(tensor: torch.Tensor, *args: object, group: object) -> None:
            send(tensor, *args, group=group)
            threads.append(threading.Thread(target=keep, args=[tensor]))
            threads[-1].start()

        monkeypatch.setattr(dist, "all_reduce", send_and_hold)
        return said

    yield begin
    for thread in threads:
        thread.join()
    collectives.await_release()
    dist.destroy_process_group()


def test_what_was_sent_is_waited_for_until_nobody_holds_it(hold: Hold) -> None:
    said = hold(0.2)
    word = torch.ones(3)
    for _ in range(3):
        collectives.all_reduce(word)
    collectives.await_release()
    assert said == ["let go"] * 3
    assert word.tolist() == [1, 1, 1]


def test_what_is_not_let_go_of_is_not_waited_for_without_end(
    hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "_PATIENCE_SECONDS", 0.01)
    said = hold(2.0)
    collectives.all_reduce(torch.ones(3), "MAX")
    collectives.await_release()
    assert said == []


def test_what_was_let_go_of_is_not_kept(hold: Hold) -> None:
    collectives.all_reduce(torch.ones(3))
    first = weakref.ref(collectives._sent[-1])
    for _ in range(7):  # one less than would push it out
        time.sleep(0.05)
        collectives.all_reduce(torch.ones(3))
    assert first() is None


def test_gloos_own_threads_let_go(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_PATIENCE_SECONDS", 100.0)
    for _ in range(100):
        collectives.all_reduce(torch.ones(3))
        collectives.await_release()


PROCESS = """
import sys, threading, time
import torch, torch.distributed as dist
from foreshock import collectives
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
send = dist.all_reduce
def keep(held):
    time.sleep(0.3)
    print("let go", flush=True)
def send_and_hold(tensor, *args, group):
    send(tensor, *args, group=group)
    threading.Thread(target=keep, args=[tensor], daemon=True).start()
dist.all_reduce = send_and_hold
collectives.all_reduce(torch.ones(3))
"""


def test_a_process_ends_when_nobody_holds_what_it_sent() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "let go\n"), done.stderr
