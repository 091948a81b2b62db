"""Telemetry of processes that are killed, forked, interrupted, or simply end."""

import random
import time

from foreshock.records import read_telemetry

WRITE_FOR_EVER = """
from foreshock.records import TelemetryWriter
step = int(sys.argv[2])
with TelemetryWriter(sys.argv[1]) as writer:
    print("ready" if writer.flush() else "not on disk", flush=True)
    while True:
        for _ in range(20):
            writer.write("telemetry", step, loss=step / 3, text="x" * 200)
            step += 1
        if writer.flush():
            print(step, flush=True)
"""


def test_killed_process_leaves_one_torn_line_at_most_and_all_that_was_flushed(
    tmp_path, start_python
):
    path = tmp_path / "telemetry.jsonl"
    moments = random.Random(0)
    num_flushed = 0
    for num_kills in range(1, 7):
        with start_python(WRITE_FOR_EVER, path, num_flushed) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.06))
            process.kill()
            flushed = process.stdout.read().split("\n")[:-1]
        num_flushed = int(flushed[-1]) if flushed else num_flushed
        telemetry = read_telemetry(path)
        written = [record for record in telemetry.records if record["event"] == "telemetry"]
        assert {record["step"] for record in written} >= set(range(num_flushed))
        assert all(record["loss"] == record["step"] / 3 for record in written)
        assert len(telemetry.records) - len(written) == num_kills  # the start records
        assert telemetry.torn_lines <= num_kills
    assert num_flushed > 0


def test_what_waits_is_written_when_the_interpreter_exits(tmp_path, run_python):
    path = tmp_path / "telemetry.jsonl"
    script = """
from foreshock.records import TelemetryWriter
writer = TelemetryWriter(sys.argv[1], capacity=10_000)
for step in range(5000):
    writer.write("telemetry", step)
"""
    run_python(script, path)
    assert len(read_telemetry(path).records) == 5001


FORK = """
import os, logging, threading
from foreshock.records import TelemetryWriter
logging.disable()
writer = TelemetryWriter(sys.argv[1])
for step in range(100):
    writer.write("telemetry", step)

# At the moment of the fork another thread holds the lock of the queue, and will not be copied.
is_held, may_release = threading.Event(), threading.Event()
def hold():
    with writer._queue._changed, writer._count_lock:
        is_held.set()
        may_release.wait()
holder = threading.Thread(target=hold)
holder.start()
is_held.wait()

child = os.fork()
if child == 0:
    dropped = writer.dropped_records
    writer.write("telemetry", 1000)
    writer.write("aborted", 1001)
    assert writer.dropped_records == dropped + 2
    assert not writer.flush()
    writer.close()
    with TelemetryWriter(sys.argv[2]) as own:
        own.write("telemetry", 7)
        assert own.flush()
    sys.exit(0)  # an ordinary exit, with all its exit handlers

may_release.set()
holder.join()
_, status = os.waitpid(child, 0)
assert status == 0, status
writer.write("telemetry", 100)
assert writer.flush()
assert writer.dropped_records == 0
"""


def test_forked_child_neither_hangs_nor_writes_twice(tmp_path, run_python):
    path, path_of_child = tmp_path / "telemetry.jsonl", tmp_path / "child.jsonl"
    run_python(FORK, path, path_of_child)
    telemetry = read_telemetry(path)
    assert [record.get("step") for record in telemetry.records] == [None, *range(101)]
    assert [record.get("step") for record in read_telemetry(path_of_child).records] == [None, 7]


FORK_AND_EXIT_ONLY = """
import os
from foreshock.records import TelemetryWriter
writer = TelemetryWriter(sys.argv[1])
for step in range(2000):
    writer.write("telemetry", step)
    if step == 1000 and os.fork() == 0:
        sys.exit(0)
os.wait()
"""


def test_child_that_only_exits_writes_nothing_of_what_waited(tmp_path, run_python):
    path = tmp_path / "telemetry.jsonl"
    run_python(FORK_AND_EXIT_ONLY, path)
    telemetry = read_telemetry(path)
    assert [record.get("step") for record in telemetry.records] == [None, *range(2000)]


INTERRUPT = """
import signal, time
from foreshock.records import TelemetryWriter
writer = TelemetryWriter(sys.argv[1], capacity=1_000_000)
num_written = 0
def interrupt(*_):
    global num_written
    num_written += 1
    writer.write("signalled", 1)
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
end = time.monotonic() + 0.3
while time.monotonic() < end:
    writer.write("telemetry", 0)
    num_written += 1
signal.setitimer(signal.ITIMER_REAL, 0)
writer.close(timeout=None)
assert writer.dropped_records == 0
"""


def test_signal_handler_that_writes_may_interrupt_a_write(tmp_path, run_python):
    path = tmp_path / "telemetry.jsonl"
    run_python(INTERRUPT, path)
    telemetry = read_telemetry(path)
    assert telemetry.torn_lines == 0
    assert any(record["event"] == "signalled" for record in telemetry.records)
